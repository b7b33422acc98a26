"""The doctor finds what is absent or broken, says how to mend it, and never crashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdet_ptq import doctor
from mmdet_ptq.doctor import NOTE, OK, PROBLEM, Finding

ROOT = Path(__file__).resolve().parent.parent


def run_doctor(folder: Path, modules: dict[str, str], check: str = 'examine') -> str:
    """Runs a check in a new interpreter in which the given files replace the real modules."""
    for name, source in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    shutil.copy(doctor.__file__, folder)  # as tools/doctor.py does, without importing the package
    command = [sys.executable, '-c', f'import doctor; print(doctor.format_table(doctor.{check}()))']
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def absent(name: str) -> str:
    return f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})'


def test_this_environment_is_healthy():
    rows = {f.name: f for f in doctor.examine()}
    assert not [f for f in rows.values() if f.status == PROBLEM]
    assert rows['torch'].found == torch.__version__
    assert rows['mmcv.ops'].found.startswith('NMS works on')
    assert 'mmdet' in rows['mmdet'].found
    assert {'onnxruntime', 'openvino', 'tensorrt', 'ncnn'} <= rows.keys()


@pytest.mark.parametrize(
    'text,machine,found,status',
    [
        (
            'model name\t: One\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n',
            'x86_64',
            'One, AVX512-VNNI, AMX',
            OK,
        ),
        ('model name\t: Two\nflags\t\t: fpu avx2\n', 'x86_64', 'Two, without VNNI', NOTE),
        ('Features\t: fp asimd asimddp\n', 'aarch64', 'aarch64, dot product', OK),
        ('', 'arm64', 'arm64, arm64', OK),
        ('', 'AMD64', 'AMD64, AMD64', OK),
    ],
)
def test_the_processor_is_told(tmp_path, monkeypatch, text, machine, found, status):
    (tmp_path / 'cpuinfo').write_text(text)
    monkeypatch.setattr(doctor, 'Path', lambda path: tmp_path / 'cpuinfo')
    monkeypatch.setattr(doctor.platform, 'machine', lambda: machine)
    monkeypatch.setattr(doctor.platform, 'processor', lambda: '')
    (row,) = doctor.processor_findings()
    assert (row.found, row.status) == (found, status)
    assert bool(row.advice) == (status == NOTE)


@pytest.mark.parametrize(
    ('version', 'status', 'told'), [((3, 9), PROBLEM, 'Python 3.12'), ((3, 15), NOTE, 'Python 3.10 to 3.14')]
)
def test_another_python_is_told_what_to_install(monkeypatch, version, status, told):
    monkeypatch.setattr(doctor.sys, 'version_info', (*version, 0))
    row = next(row for row in doctor.examine() if row.name == 'python')
    assert row.status == status and told in row.advice and 'install Python 3.12' in row.advice


def test_everything_absent(tmp_path):
    names = ['torch', 'mmengine', 'mmcv', 'mmdet', 'cv2', 'pycocotools', 'rich']
    out = run_doctor(tmp_path, {f'{name}.py': absent(name) for name in names})
    for name in ('torch', 'opencv', 'mmengine', 'mmcv', 'mmdet', 'pycocotools'):
        assert f'PROBLEM {name}: ' in out  # the advice, not only the row
    assert '`pip install rich`' in out


MMCV = {'mmcv/__init__.py': '__version__ = "2.1.0"'}
PYCOCOTOOLS = {'pycocotools/__init__.py': ''}


@pytest.mark.parametrize(
    ('check', 'modules', 'advice'),
    [
        (
            '_opencv',
            {'cv2.py': 'raise ImportError("libGL.so.1: cannot open shared object file")'},
            'opencv-python-headless',
        ),
        ('_mmcv', {**MMCV, 'mmcv/ops.py': absent('mmcv._ext')}, 'mmcv-lite and an mmcv built without torch lack'),
        (
            '_mmcv',
            {**MMCV, 'mmcv/ops.py': 'raise ImportError("_ext.so: undefined symbol: _ZN")'},
            'compiled against another torch',
        ),
        (
            '_mmcv',
            {**MMCV, 'mmcv/ops.py': 'def nms(*a): raise RuntimeError("no kernel")'},
            'Build mmcv again against this torch',
        ),
        (
            '_mmcv',
            {**MMCV, 'mmcv/ops.py': 'import torch\ndef nms(*a): return None, torch.tensor([1])'},
            'NMS keeps boxes [1] instead of [0, 2]',
        ),
        (
            'mmdet_findings',
            {'mmdet.py': 'raise AssertionError("MMCV==2.2.0 is used but incompatible. Please install")'},
            'mmdet 3.3.0 goes with mmcv 2.1.0',
        ),
        ('mmdet_findings', {'mmdet.py': 'raise RuntimeError("anything")'}, 'mend the rows above first'),
        (
            '_pycocotools',
            {**PYCOCOTOOLS, 'pycocotools/mask.py': 'raise ValueError("numpy.dtype size changed")'},
            'must fit the numpy',
        ),
    ],
)
def test_broken_package(tmp_path, check, modules, advice):
    out = run_doctor(tmp_path, modules, check)
    assert advice in out
    assert out.rstrip().endswith('1 problem found.')


@pytest.mark.parametrize(('status', 'code'), [(OK, 0), (NOTE, 0), (PROBLEM, 1)])
def test_exit_code(monkeypatch, status, code):
    monkeypatch.setattr(doctor, 'examine', lambda: [Finding('a', '1', status)])
    assert doctor.main() == code


def test_missing_pkg_resources_matters_to_the_original_mmengine_only(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)  # importing it raises ModuleNotFoundError
    for owner, status in (('mmengine', PROBLEM), ('onedl-mmengine', OK)):
        monkeypatch.setattr(doctor, '_distributions', lambda module, owner=owner: [owner])
        assert doctor.setuptools_findings()[0].status == status


@pytest.mark.parametrize(
    ('owners', 'status'),
    [
        ({'mmengine': ['mmengine'], 'mmcv': ['mmcv'], 'mmdet': ['mmdet']}, None),
        ({'mmengine': ['mmengine'], 'mmcv': ['mmcv'], 'mmdet': ['onedl-mmdetection']}, NOTE),
        ({'mmengine': ['mmengine'], 'mmcv': ['mmcv'], 'mmdet': ['mmdet', 'onedl-mmdetection']}, PROBLEM),
    ],
)
def test_mixed_stacks(monkeypatch, owners, status):
    monkeypatch.setattr(doctor, '_distributions', owners.__getitem__)
    found = {f.name: f.status for f in doctor.mmdet_findings()}
    assert found.get('stack') == status


def test_broken_runtime_is_only_a_note(tmp_path):
    runtime = tmp_path / 'deploy' / 'openvino' / 'runtime.py'
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    out = run_doctor(tmp_path, {'openvino.py': 'raise ImportError("libtbb.so.12: not found")'}, 'runtime_findings')
    assert 'note    openvino: ' in out
    assert out.rstrip().endswith('No problem found.')


def test_table_counts_problems():
    table = doctor.format_table([Finding('a', '1'), Finding('longer', 'absent', PROBLEM, 'Install it.')])
    assert 'ok      a       1' in table
    assert 'PROBLEM longer: Install it.' in table
    assert table.endswith('1 problem found.')


def test_command_line_works_on_a_broken_stack(tmp_path):
    (tmp_path / 'mmengine.py').write_text('raise RuntimeError("broken")')
    (tmp_path / 'torch.py').write_text('raise ImportError("broken")')
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'doctor.py'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    assert 'PROBLEM mmengine     RuntimeError: broken' in done.stdout
