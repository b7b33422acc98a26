"""The command lines: one sentence for every mistake, before anything that takes long."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config

from mmdet_ptq import PTQError, cli, load_quantized
from mmdet_ptq.testing import tiny_config


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Tiny detectors are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('cli')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=3, batch_size=3))
    cfg.dump(folder / 'tiny.py')
    return folder / 'tiny.py'


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Keeps work directories out of the repository, and the environment as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK'):
        monkeypatch.setenv(name, os.environ.get(name, ''))
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)


@pytest.fixture
def no_long_work(monkeypatch):
    """Fails when a mistake is found only after the detector has run."""
    monkeypatch.setattr(
        'mmdet_ptq.engine.stages.calibrate.prepare_detector', lambda *args: pytest.fail('the work has begun')
    )


@pytest.fixture
def refused(config_file, capfd, no_long_work):
    """Runs a command that must end with one sentence; returns the sentence."""

    def run(*arguments: str, command=cli.ptq, config: Path | str = config_file) -> str:
        with pytest.raises(SystemExit) as stopped:
            command([str(config), *map(str, arguments)])
        assert stopped.value.code == 2
        error = capfd.readouterr().err
        assert 'Traceback' not in error
        lines = [line for line in error.splitlines() if line.startswith('error: ')]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0])
        return lines[0]

    return run


def test_no_ptq_block(refused, config_file, tmp_path):
    cfg = Config.fromfile(config_file)
    cfg.pop('ptq')
    cfg.dump(tmp_path / 'plain.py')
    assert 'no `ptq` block' in refused(config=tmp_path / 'plain.py')


@pytest.mark.parametrize(
    'option, words',
    [
        ('ptq.wieghts.bits=8', "no key 'wieghts'. Did you mean 'weights'?"),
        ('ptq.weights.bitz=8', "no key 'bitz'. Did you mean 'bits'?"),
        ('ptq.weights.bits=9', '`ptq.weights.bits` must be one of'),
        ('ptq.preset=w8a9', "'w8a9', which is unknown. Did you mean 'w8a8'?"),
        ('ptq=w8a8', '`ptq` must be a dict'),
        ('ptq.weights.bits', 'KEY=VALUE'),
        ('=8', 'KEY=VALUE'),
        ('ptq..bits=8', 'KEY=VALUE'),
        ('ptq.weights.bits=[1,2', 'cannot be applied'),
        ('test_evaluator.ann_file=missing.json', "'missing.json', which does not exist"),
        ('test_dataloader.dataset.ann_file=missing.json', "missing.json', which does not exist"),
        ('train_dataloader.dataset.ann_file=missing.json', "missing.json', which does not exist"),
        ('train_dataloader.dataset.ann_file=annotations/instances_none.json', 'check `data_root` and `ann_file`'),
    ],
)
def test_a_wrong_value(refused, option, words):
    assert words in refused('--cfg-options', option)


def test_a_wrong_number_of_images_with_fast(refused):
    said = refused('--fast', '--cfg-options', 'ptq.calibration.num_images=all')
    assert '`ptq.calibration.num_images` must be' in said


@pytest.mark.parametrize('arguments', [[], ['--fast', '--seed', '7']])
def test_a_calibration_that_is_no_section(refused, config_file, tmp_path, arguments):
    cfg = Config.fromfile(config_file)
    cfg.ptq.calibration = 'data/images'
    cfg.dump(tmp_path / 'slip.py')
    assert '`ptq.calibration` must be a dict, as dict(images=' in refused(*arguments, config=tmp_path / 'slip.py')


@pytest.mark.parametrize(
    'visible, device, taken', [('', 'cuda:1', '1'), ('2,3', 'cuda:1', '3'), ('GPU-a, GPU-b', 'cuda:0', 'GPU-a')]
)
def test_a_gpu_is_one_of_those_that_are_visible(refused, monkeypatch, visible, device, taken):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert 'torch sees no GPU' in refused('--device', device)
    assert os.environ['CUDA_VISIBLE_DEVICES'] == taken


def test_a_gpu_that_is_not_visible(refused, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
    assert 'asks for more GPUs than CUDA_VISIBLE_DEVICES=2,3' in refused('--device', 'cuda:2')
    assert 'must be cpu, cuda or cuda:N' in refused('--device', 'cuda:first')


def test_an_unknown_preset_on_the_command_line(refused):
    assert "Did you mean 'w4a8'?" in refused('--preset', 'w4a_8')


def test_a_missing_config(refused, config_file):
    assert "Did you mean 'tiny.py'?" in refused(config=config_file.with_name('tinny.py'))


def test_a_broken_config(refused, tmp_path):
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    assert 'cannot be read' in refused(config=tmp_path / 'broken.py')
    (tmp_path / 'lost.py').write_text("custom_imports = dict(imports=['no_such_module'])\n")
    assert 'no_such_module' in refused(config=tmp_path / 'lost.py')


def test_a_config_with_a_byte_order_mark(refused, tmp_path):
    (tmp_path / 'marked.py').write_text('\ufeffmodel = 1\n', encoding='utf-8')
    assert 'save it as UTF-8 without a byte order mark (BOM)' in refused(config=tmp_path / 'marked.py')


def test_a_missing_checkpoint_is_the_first_thing_said(refused, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.config.Config.fromfile', lambda *args: pytest.fail('the config is read'))
    assert 'there is no checkpoint' in refused(tmp_path / 'missing.pth')


def test_a_missing_checkpoint_of_the_config_is_said_before_anything_is_built(refused, monkeypatch):
    monkeypatch.setattr('mmdet_ptq.engine.PTQRunner.from_cfg', lambda *args: pytest.fail('the runner is built'))
    assert "there is no checkpoint 'missing.pth'" in refused('--cfg-options', 'load_from=missing.pth')


def test_no_checkpoint_is_named(refused):
    assert 'no float checkpoint is named' in refused('--cfg-options', 'load_from=None')


def altered(config_file: Path, tmp_path: Path, change) -> Path:
    checkpoint = torch.load(config_file.with_name('float.pth'), weights_only=True)
    change(checkpoint['state_dict'])
    torch.save(checkpoint, tmp_path / 'altered.pth')
    return tmp_path / 'altered.pth'


def test_a_checkpoint_of_another_architecture(refused, config_file, tmp_path):
    def widen(state):
        state['bbox_head.retina_cls.bias'] = torch.zeros(30)

    sentence = refused(altered(config_file, tmp_path, widen))
    assert 'does not fit the model' in sentence and 'bbox_head.retina_cls.bias is (30,), not (9,)' in sentence


def test_a_checkpoint_that_lacks_a_weight(refused, config_file, tmp_path):
    def remove(state):
        del state['backbone.conv1.weight']

    assert 'first: backbone.conv1.weight is missing' in refused(altered(config_file, tmp_path, remove))


def test_a_weight_that_is_not_finite(refused, config_file, tmp_path):
    def spoil(state):
        state['neck.fpn_convs.0.conv.weight'][0, 0, 0, 0] = float('nan')

    sentence = refused(altered(config_file, tmp_path, spoil))
    assert 'neck.fpn_convs.0.conv.weight' in sentence and 'NaN' in sentence


class Harmful:
    """What a checkpoint must not bring along."""


def test_a_pickled_checkpoint(refused, tmp_path):
    torch.save(dict(state_dict={}, model=Harmful()), tmp_path / 'pickled.pth')
    assert 'holds pickled objects' in refused(tmp_path / 'pickled.pth')


@pytest.mark.parametrize('content', [b'', b'this is no checkpoint', b'<html>', b'PK\x03\x04 torn'])
def test_a_damaged_checkpoint(refused, tmp_path, content):
    (tmp_path / 'damaged.pth').write_bytes(content)
    assert 'is damaged or no torch checkpoint' in refused(tmp_path / 'damaged.pth')


def test_calibration_images_that_are_evaluation_images(refused):
    sentence = refused(
        '--cfg-options',
        'train_dataloader.dataset.ann_file=annotations/instances_val.json',
        'train_dataloader.dataset.data_prefix.img=val/',
    )
    assert '3 calibration images are also evaluation images' in sentence


def test_an_override_that_matches_no_layer(config_file, capfd):
    # layer names are known only once the detector has run on one image
    with pytest.raises(SystemExit) as stopped:
        cli.ptq([str(config_file), '--cfg-options', 'ptq.overrides.bakbone=float'])
    assert stopped.value.code == 2
    assert "Did you mean 'backbone'?" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')
@pytest.mark.parametrize('command', [cli.ptq, cli.test])
def test_a_gpu_that_is_not_there(refused, config_file, command):
    assert 'torch sees no GPU' in refused(config_file.with_name('float.pth'), '--device', 'cuda', command=command)


def test_an_unknown_device(refused):
    assert '--device must be cpu, cuda or cuda:N' in refused('--device', 'tpu')


def test_a_work_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / 'file').touch()
    assert 'cannot make the folder' in refused('--work-dir', tmp_path / 'file' / 'inside')


def test_a_full_disk(refused, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(1 << 30, 1 << 30, 1000))
    assert 'free some space' in refused()


def test_evaluating_a_float_checkpoint(refused, config_file):
    assert 'is no quantized checkpoint' in refused(config_file.with_name('float.pth'), command=cli.test)


def test_a_custom_detector_and_a_seed(config_file, tmp_path, monkeypatch, capfd, no_long_work):
    """A user's own module, then the quantized checkpoint where the float one belongs."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'users_detector.py').write_text(
        'from mmdet.models import RetinaNet\nfrom mmdet.registry import MODELS\n\n\n'
        '@MODELS.register_module(force=True)\nclass UsersDetector(RetinaNet):\n    pass\n'
    )
    (tmp_path / 'custom.py').write_text(
        f"_base_ = '{config_file}'\ncustom_imports = dict(imports=['users_detector'])\n"
        "model = dict(type='UsersDetector')\n"
    )
    cli.ptq([str(tmp_path / 'custom.py'), '--seed', '7', '--work-dir', str(tmp_path / 'out'), '--device', 'cpu'])
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['seed'] == 7 and results['recipe']['calibration']['seed'] == 7
    assert results['coverage']['integer_mac_share'] == 1.0
    with pytest.raises(PTQError, match=r'needs users_detector.*trust_config=True \(--trust-config\)'):
        load_quantized(tmp_path / 'out' / 'quantized.pth')
    trusted = load_quantized(tmp_path / 'out' / 'quantized.pth', trust_config=True)
    assert type(trusted).__name__ == 'UsersDetector'
    capfd.readouterr()
    with pytest.raises(SystemExit):
        cli.ptq([str(config_file), str(tmp_path / 'out' / 'quantized.pth')])
    assert 'is already quantized' in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('images', [3, 100, None])
def test_fast_searches_and_trains_nothing(config_file, tmp_path, monkeypatch, images):
    seen = []
    monkeypatch.setattr('mmdet_ptq.engine.PTQRunner.run', lambda runner, dry: seen.append(runner.ptq))
    cfg = Config.fromfile(config_file)
    cfg.ptq = dict(
        preset='w4a8', protect=dict(), **({} if images is None else dict(calibration=dict(num_images=images)))
    )
    cfg.dump(tmp_path / 'thorough.py')
    for arguments in ([], ['--fast', '--seed', '7']):
        cli.ptq([str(tmp_path / 'thorough.py'), '--work-dir', str(tmp_path / 'out'), *arguments])
    thorough, fast = seen
    assert thorough.reconstruct and thorough.protect and thorough.global_loss
    assert not (fast.reconstruct or fast.protect or fast.global_loss)
    assert fast.calibration.num_images == min(images or 256, cli.FAST_IMAGES) and fast.calibration.seed == 7
    assert fast.weights == thorough.weights and fast.activations == thorough.activations


def test_a_pure_python_config(config_file, tmp_path):
    (tmp_path / 'base.py').write_text(config_file.read_text())
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.config import read_base\nfrom mmdet.models import RetinaNet\n'
        'from mmdet_ptq.quantizers import AffineQuantizer\n\n'
        'with read_base():\n    from .base import *\n\n'
        'model.update(dict(type=RetinaNet))\n'
        # as mmdet's own new-style configs have it
        'default_scope = None\n'
        'ptq.update(dict(weights=dict(quantizer=dict(type=AffineQuantizer))))\n'
    )
    cli.ptq([str(tmp_path / 'lazy.py'), '--work-dir', str(tmp_path / 'out')])
    cli.test([str(tmp_path / 'lazy.py'), str(tmp_path / 'out' / 'quantized.pth')])
    detector = load_quantized(tmp_path / 'out' / 'quantized.pth')
    assert len(inference_detector(detector, str(config_file.parent / 'val' / '000000.png')).pred_instances) > 0


def test_installed_commands_are_those_of_tools():
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 brings it')
    root = Path(__file__).resolve().parent.parent
    scripts = tomllib.loads((root / 'pyproject.toml').read_text())['project']['scripts']
    tools = {path.stem for path in (root / 'tools').glob('*.py') if 'mmdet_ptq.cli import' in path.read_text()}
    assert scripts['mmdet-ptq'] == 'mmdet_ptq.cli:main'
    assert {target.partition(':')[2] for target in scripts.values()} | {'ptq'} == tools | {'main'}
    for target in scripts.values():
        module, _, name = target.partition(':')
        assert module == 'mmdet_ptq.cli' and callable(getattr(cli, name))


@pytest.mark.parametrize(
    ('launcher', 'missing'), [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM')]
)
def test_a_launcher_that_did_not_start_the_process(refused, monkeypatch, launcher, missing):
    for name in [name for name in os.environ if name.startswith(('RANK', 'WORLD_', 'MASTER_', 'SLURM', 'OMPI'))]:
        monkeypatch.delenv(name)
    said = refused('--launcher', launcher)
    assert f'--launcher {launcher} needs {missing}' in said and 'or leave the option out' in said


def test_a_process_whose_partner_ended(refused, monkeypatch):
    def closed(*args):
        raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5190')

    monkeypatch.setattr(cli, 'load_config', closed)
    assert 'another process of this run has ended, its message says why; the finished stages are kept' in refused()


def test_a_seed_out_of_range(refused):
    assert 'must be a whole number from 0 to 4294967295, got -1' in refused('--seed', '-1')


def test_a_full_disk_is_one_sentence_wherever_it_shows(config_file, capfd, monkeypatch):
    """mmengine writes files, too, and torch's writer hides the system's error."""

    def write(cfg):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError:
            raise RuntimeError('unexpected pos')  # noqa: B904

    monkeypatch.setattr('mmdet_ptq.engine.PTQRunner.from_cfg', write)
    with pytest.raises(SystemExit) as stopped:
        cli.ptq([str(config_file)])
    assert stopped.value.code == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith('error: cannot write the files of the run: the disk is full; free some space')
