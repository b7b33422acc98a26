"""A library's copy for another processor: its CPUID answers without what is absent, and it is otherwise the same."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdet_ptq.testing import processors

# a library that asks for its processor, and that has the bytes of the instruction elsewhere, too
LIBRARY = r"""
#include <cpuid.h>
const unsigned char data[16] __attribute__((aligned(16))) = {0x0f, 0xa2, 1, 2, 0x0f, 0xa2};
unsigned constant(void) { return 0x1234a20f; }
void leaf(unsigned number, unsigned part, unsigned *out) {
    __cpuid_count(number, part, out[0], out[1], out[2], out[3]);
}
"""
ASK = """
import ctypes, json, pathlib, sys
import onnxruntime
place = pathlib.Path(onnxruntime.__file__).parent
library = ctypes.CDLL(str(place / 'capi' / 'tiny.so'))
def leaf(*which):
    out = (ctypes.c_uint * 4)()
    library.leaf(*which, out)
    return list(out)
library.constant.restype = ctypes.c_uint
data = list((ctypes.c_ubyte * 6).in_dll(library, 'data'))
leaves = [leaf(*which) for which in ((0, 0), (7, 0), (7, 1))]
print(json.dumps(dict(place=str(place), leaves=leaves, constant=library.constant(), data=data, told=onnxruntime.told)))
"""
# bits of leaf 7 (part, register): what a processor without VNNI and AMX does not have
VNNI = {(1, 2): [11], (1, 3): [22, 24, 25], (2, 0): [4, 5], (2, 3): [4, 10]}
AVX512 = {(1, 1): [16, 17, 21, 28, 30, 31]}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package that stands in for ONNX Runtime, of which there is one library of a few bytes."""
    place = tmp_path / 'installed' / 'onnxruntime'
    (place / 'capi').mkdir(parents=True)
    (place / '__pycache__').mkdir()
    (place / '__pycache__' / 'stale.pyc').write_bytes(b'')
    (place / '__init__.py').write_text('told = "imported"\n')
    (place / 'capi' / 'libonnxruntime.so.1').write_bytes(b'not read by Python')
    find = importlib.util.find_spec
    spec = SimpleNamespace(origin=str(place / '__init__.py'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: spec if name == 'onnxruntime' else find(name))
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0')
    if reason := processors.cannot_emulate():
        pytest.skip(reason)
    source = tmp_path / 'tiny.c'
    source.write_text(LIBRARY)
    subprocess.run(['gcc', '-O1', '-shared', '-fPIC', '-o', place / 'capi' / 'tiny.so', source], check=True)
    return place


def asked(env: dict[str, str]) -> dict:
    done = subprocess.run([sys.executable, '-c', ASK], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without(leaves: list[list[int]], *absent: dict) -> list[list[int]]:
    leaves = [list(leaf) for leaf in leaves]
    for bits in absent:
        for (leaf, register), numbers in bits.items():
            for number in numbers:
                leaves[leaf][register] &= ~(1 << number)
    return leaves


@pytest.mark.parametrize('processor, absent', [('avx512', [VNNI]), ('avx2', [VNNI, AVX512])])
def test_the_copy_answers_without_what_is_absent_and_is_else_the_same(package, tmp_path, processor, absent):
    here = asked({**os.environ, 'PYTHONPATH': str(package.parent)})
    found = asked(processors.environment(processor, tmp_path / 'copies'))
    assert Path(found['place']).is_relative_to(tmp_path / 'copies') and here['place'] == str(package)
    assert found['leaves'] == without(here['leaves'], *absent)
    # the vendor is left, and so are the instruction's bytes where they are none
    assert found['leaves'][0] == here['leaves'][0]
    assert found['constant'] == here['constant'] == 0x1234A20F
    assert found['data'] == here['data'] == [0x0F, 0xA2, 1, 2, 0x0F, 0xA2]
    assert found['told'] == 'imported'


def test_a_copy_is_made_once_and_leaves_the_package_as_it_was(package, tmp_path):
    before = {path: path.read_bytes() for path in package.rglob('*') if path.is_file()}
    first = processors.environment('avx2', str(tmp_path / 'copies'))
    (copied,) = (tmp_path / 'copies').iterdir()
    names = {path.relative_to(copied / 'onnxruntime').as_posix() for path in copied.rglob('*') if path.is_file()}
    assert names == {'__init__.py', 'capi/tiny.so', 'processor.c', 'processor.so'}
    (copied / 'marked').write_text('the same copy')
    second = processors.environment('avx512', tmp_path / 'copies')
    assert [path.name for path in (tmp_path / 'copies').iterdir()] == [copied.name] and (copied / 'marked').exists()
    assert first['PYTHONPATH'].split(os.pathsep)[0] == second['PYTHONPATH'].split(os.pathsep)[0] == str(copied)
    assert {path: path.read_bytes() for path in package.rglob('*') if path.is_file()} == before


def test_the_environment_keeps_what_there_is_and_tells_onednn(package, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', '/somewhere')
    monkeypatch.setenv('OTHER', 'kept')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    env = processors.environment('avx512')
    (copied,) = (tmp_path / 'cache' / 'mmdet-ptq' / 'processors').iterdir()
    assert env['PYTHONPATH'] == f'{copied}{os.pathsep}/somewhere' and env['OTHER'] == 'kept'
    assert env['ONEDNN_MAX_CPU_ISA'] == 'AVX512_CORE'
    assert 'ONEDNN_MAX_CPU_ISA' not in os.environ and os.environ['PYTHONPATH'] == '/somewhere'
    monkeypatch.delenv('PYTHONPATH')
    assert processors.environment('avx2')['PYTHONPATH'] == str(copied)


@pytest.mark.parametrize('system, machine', [('Linux', 'aarch64'), ('Darwin', 'x86_64'), ('Windows', 'AMD64')])
def test_other_machines_are_told_of(monkeypatch, capsys, system, machine):
    monkeypatch.setattr(platform, 'system', lambda: system)
    monkeypatch.setattr(platform, 'machine', lambda: machine)
    told = 'processors without VNNI are emulated on x86 under Linux'
    assert processors.cannot_emulate() == told
    assert processors.main(['avx2', sys.executable, '-c', '']) == 2
    assert capsys.readouterr().err == f'error: {told}\n'


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(platform, 'system', lambda: 'Linux')
    monkeypatch.setattr(platform, 'machine', lambda: 'x86_64')
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: None if name == 'onnxruntime' else find(name))
    monkeypatch.setattr(shutil, 'which', lambda name: None if name == 'objdump' else f'/usr/bin/{name}')
    assert processors.cannot_emulate() == 'needs objdump and onnxruntime to emulate a processor without VNNI'


@pytest.mark.parametrize('argv', [[], ['avx2'], ['avx1', 'true'], ['', 'true']])
def test_a_wrong_command_line_is_told_how_to_be(capsys, argv):
    assert processors.main(argv) == 2
    told = capsys.readouterr()
    assert told.err == 'usage: python -m mmdet_ptq.testing.processors {avx2,avx512} COMMAND ...\n' and not told.out
