"""What every runtime has: files of a model, its networks, its time and its errors; by a runtime made for that."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ptq.deploy import runtime as module
from mmdet_ptq.deploy.runtime import (
    IntegerCoverage,
    Runtime,
    file_digest,
    fixed_size,
    get_runtime,
    model_bytes,
    model_files,
    open_model,
    remove_parts,
    runtime_of,
    worst_case,
)
from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import RUNTIMES
from mmdet_ptq.testing import tiny_detector
from mmdet_ptq.wrapping import Structure

HEAD = 'roi_head.bbox_head'
FAILURES = dict(memory=MemoryError, value=ValueError, ptq=PTQError)


class Scaling(Runtime):
    """Reads a text that says of itself by what its images are multiplied."""

    name, suffix, weights, source = 'scaling', '.scale', '.more', '.from'
    dynamic_size = True

    def __init__(self, path, threads=None):
        self.meta, self.threads, self.given = json.loads(Path(path).read_text()), threads, []

    def __call__(self, *inputs):
        self.given.append([given.shape for given in inputs])
        with self.running(inputs):
            if 'fails' in self.meta:
                raise FAILURES[self.meta['fails']](*self.meta['told'])
            return [given * np.float32(self.meta['factor']) for given in inputs]

    def coverage(self):
        return IntegerCoverage(self.meta['integer'], self.meta['float'])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(RUNTIMES.module_dict, 'scaling', Scaling)
    module.warn_once.cache_clear()


@pytest.fixture
def written(tmp_path):
    """Writes a model with the files of its heads, and returns its path."""

    def write(heads=(HEAD,), **meta):
        parts = {}
        for number, head in enumerate(heads, 2):
            told = dict(factor=number, inputs=[[number, 3], [number, 2, 5]], integer=[head], float=[])
            path = tmp_path / f'model-{head}.scale'
            path.write_text(json.dumps(told))
            path.with_suffix('.from').write_text(head)
            parts[head] = hashlib.sha256(head.encode()).hexdigest()
        path = tmp_path / 'model.scale'
        path.write_text(json.dumps(dict(dict(factor=1, integer=['a'], float=['b'], parts=parts), **meta)))
        return path

    return write


def test_a_model_is_opened_with_all_its_networks(written):
    model = open_model(written(heads=(HEAD, f'{HEAD}#1')), threads=3)
    assert type(model) is Scaling and list(model.parts) == [HEAD, f'{HEAD}#1']
    assert [part.threads for part in (model, *model.parts.values())] == [3, 3, 3]
    image = np.ones((2, 3, 4, 5), np.float32)
    found = [part(image)[0].max() for part in (model, *model.parts.values())]
    assert found == [1, 2, 3]
    assert model.whole_coverage() == IntegerCoverage(['a', HEAD, f'{HEAD}#1'], ['b'])
    assert model.coverage() == IntegerCoverage(['a'], ['b'])


def test_every_network_runs_once_for_its_time(written):
    model = open_model(written(heads=(HEAD, f'{HEAD}#1')))
    model.run_all(np.zeros((1, 3, 8, 8), np.float32))
    assert model.given == [[(1, 3, 8, 8)]]
    assert [part.given for part in model.parts.values()] == [[[(2, 3), (2, 2, 5)]], [[(3, 3), (3, 2, 5)]]]


@pytest.mark.parametrize(
    'change, told',
    [
        (lambda part: part.unlink(), 'is missing'),
        (lambda part: part.with_suffix('.from').unlink(), 'is missing'),
        (lambda part: part.with_suffix('.from').write_text('other'), 'is of another model'),
    ],
)
def test_a_network_that_is_not_there_or_of_another_model_is_refused(written, change, told):
    path = written()
    change(path.with_name(f'model-{HEAD}.scale'))
    sentence = rf"model-{HEAD}\.scale', a network of the same detector, {told}; keep all files together or export again"
    with pytest.raises(PTQError, match=sentence):
        open_model(path)


def test_files_are_found_by_the_name_of_their_model(written, tmp_path):
    path = written(heads=(f'{HEAD}.0', f'{HEAD}.1'))
    path.with_suffix('.more').write_bytes(bytes(100))
    (tmp_path / f'model-{HEAD}.1.more').write_bytes(bytes(7))
    # of other models and runtimes
    for name in ('model-2.scale', 'other.scale', f'other-{HEAD}.0.scale', 'model.onnx', f'model-{HEAD}.0.onnx'):
        (tmp_path / name).write_bytes(bytes(1000))
    names = ['model.scale', 'model.more', f'model-{HEAD}.0.scale', f'model-{HEAD}.1.scale', f'model-{HEAD}.1.more']
    assert [file.name for file in model_files(path)] == names
    assert model_bytes(path) == sum((tmp_path / name).stat().st_size for name in names)
    remove_parts(path)
    assert not any((tmp_path / name).exists() for name in names)
    assert (tmp_path / f'other-{HEAD}.0.scale').exists() and (tmp_path / f'model-{HEAD}.0.from').exists()


def test_a_model_of_one_network_is_no_part_and_patterns_are_names(tmp_path):
    path = tmp_path / 'model[1].scale'
    assert model_files(path) == [] and model_bytes(path) == 0
    path.write_text('{}')
    (tmp_path / f'model1-{HEAD}.scale').write_text('{}')
    remove_parts(path)
    assert model_files(path) == [path]
    # what no runtime reads may be named as well
    (tmp_path / 'model.unknown').write_text('')
    assert model_files(tmp_path / 'model.unknown') == [tmp_path / 'model.unknown']


def test_a_digest_is_of_every_byte(tmp_path):
    for number, content in enumerate((b'', b'a', b'a\0')):
        (tmp_path / str(number)).write_bytes(content)
    assert len({file_digest(tmp_path / str(number)) for number in range(3)}) == 3
    assert file_digest(tmp_path / '1') == hashlib.sha256(b'a').hexdigest()


def test_runtimes_are_known_by_name_and_suffix(tmp_path):
    assert get_runtime('scaling') is Scaling is runtime_of('a/b.scale')
    with pytest.raises(PTQError, match=r"^`ptq\.export` knows .*'ncnn', .*'scaling'.*, got 'scalin'\..*'scaling'"):
        get_runtime('scalin')
    with pytest.raises(PTQError, match=r"^`--to` knows .*, got 'nothing'\.$"):
        get_runtime('nothing', '--to')
    for name in ('model.pth', 'model', 'model.SCALE'):
        (tmp_path / name).write_text('')
        with pytest.raises(PTQError, match=r'is no model of a known runtime; their suffixes are \.engine, .*\.scale'):
            open_model(tmp_path / name)
    for missing in (tmp_path / 'missing.scale', tmp_path):
        with pytest.raises(PTQError, match='there is no model .*; check the path'):
            open_model(missing)


@pytest.mark.parametrize(
    'fails, told, sentence',
    [
        ('value', ['first\nsecond.'], r'^scaling cannot run the model on what has the shapes \[\[1, 3, 2, 2\]\]: '),
        ('value', [], r'^scaling cannot run .*: ValueError: raise .* in test_runtime\.py\.$'),
        ('memory', [], r'^running a model of scaling takes more than \d+ MiB of memory'),
        ('ptq', ['as it is.'], r'^as it is\.$'),
    ],
)
def test_errors_of_a_run_are_one_sentence(written, fails, told, sentence):
    model = open_model(written(fails=fails, told=told))
    with pytest.raises(PTQError, match=sentence) as error:
        model(np.zeros((1, 3, 2, 2), np.float32))
    assert '\n' not in str(error.value) and len(str(error.value)) < 450


def test_a_run_whose_sizes_are_known_is_not_bounded(written, monkeypatch):
    seen = []

    def bounds(what, memory, seconds=None):
        seen.append((what, memory))
        return module.nullcontext()

    monkeypatch.setattr(module, 'bounds', bounds)
    model, image = Scaling(written()), np.zeros((2, 3, 2, 2), np.float32)
    model(image)
    model.sized = True
    model(image)
    assert len(seen) == 1
    # an open size is known to a run only, and regions take memory of their own
    model.meta.update(size_divisor=32, regions=100)
    model(image)
    assert [what for what, _ in seen] == ['running a model of scaling'] * 2
    assert seen[1][1] - seen[0][1] == 2 * 100 * 3 * 2**20


@pytest.mark.parametrize(
    'meta, told',
    [
        (dict(space_to_depth={}, saturating=['a', 'b']), r'products of 2 of its layers saturate.*calibrate again'),
        (dict(saturating=['a']), r'products of 1 of its layers saturate'),
        (dict(space_to_depth={}), r'its 8-bit products may saturate.*export its checkpoint again'),
        (dict(space_to_depth={}, saturating=[]), '^$'),
        # a float one of an older version
        ({}, '^$'),
    ],
)
def test_wrong_results_are_told_once_where_the_processor_saturates(written, monkeypatch, meta, told):
    said = []
    monkeypatch.setattr(module, 'print_log', lambda text, logger, level: said.append(text))
    path = written(**meta)
    assert open_model(path).remark() == '' and not said
    monkeypatch.setattr(Scaling, 'saturates', staticmethod(lambda: True))
    remarks = {open_model(path).remark() for _ in range(3)}
    assert len(remarks) == 1 and said == [text for text in remarks if text]
    assert re.search(told, remarks.pop())


class Doubled(nn.Module):
    """A detector whose one output is its image, twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs, data_samples=None, mode='predict'):
        assert inputs.shape[2] < 100
        return [inputs * 2 * self.weight]


@pytest.mark.parametrize('factor, right', [(2, True), (2.001, True), (2.2, False), (np.nan, False)])
def test_a_graph_that_is_wrong_on_other_sizes_is_removed(written, factor, right):
    path = written(heads=(), factor=factor)
    path.with_suffix('.more').write_text('')
    if right:
        Scaling.check_other_size(path, Doubled().requires_grad_(False), (1, 3, 32, 32), 32)
        assert len(model_files(path)) == 2
        return
    told = r'cannot stay open: the exported graph is wrong on other sizes; .*`--dynamic-size`'
    with pytest.raises(PTQError, match=told):
        Scaling.check_other_size(path, Doubled().requires_grad_(False), (1, 3, 32, 32), 32)
    assert model_files(path) == []


def test_a_graph_that_fails_on_other_sizes_is_removed(written):
    failing = [dict(fails='value', told=['no']), dict(factor=2)]
    for meta, side in zip(failing, (32, 96), strict=True):  # the second time the detector fails
        path = written(heads=(), **meta)
        with pytest.raises(PTQError, match='wrong on other sizes'):
            Scaling.check_other_size(path, Doubled().requires_grad_(False), (1, 3, side, 32), 32)
        assert not path.exists()


def test_what_a_runtime_does_not_say_is_plain(monkeypatch):
    with pytest.raises(
        PTQError, match='^scaling reads no ONNX files; export to it with `mmdet-ptq-export --to scaling`'
    ):
        Scaling.dialect()
    assert Scaling.explain_float(Structure()) == '' and Scaling.needed_activations(8) == {}
    assert Scaling.saturates() is False and dict(Runtime.parts) == {}
    Scaling.check()
    monkeypatch.setattr(Scaling, 'packages', ('no-such-package>=1',))
    with pytest.raises(PTQError, match=r'no-such-package.*mmdet-ptq\[scaling\]'):
        Scaling.check()
    Scaling.check_export()


def test_detectors_of_one_stage_are_taken_and_their_sizes_may_stay_open():
    detector = tiny_detector('retinanet')
    Scaling.check_detector(detector)
    Scaling.check_dynamic_size(detector)
    with pytest.raises(PTQError, match='FasterRCNN has two stages, and scaling takes detectors of one'):
        Scaling.check_detector(tiny_detector('faster_rcnn'))
    assert fixed_size('because') == (
        'the size of images cannot stay open: because; give a height and a width in place of '
        "`ptq.export_size='dynamic'` (`--dynamic-size`), or leave it out."
    )


def test_the_worst_case_overflows_16_bits_in_pairs():
    image, weight, total = worst_case()
    sums = (weight[:, :, 0, 0].astype(np.int64) @ image[0, :, 0, 0].astype(np.int64)).tolist()
    assert sums == [total] * len(weight) and image.dtype == np.uint8 and weight.dtype == np.int8
    products = image[0, :, 0, 0].astype(np.int64) * weight[0, :, 0, 0]
    assert (products[::2] + products[1::2] > 2**15 - 1).all() and (products <= 2**15 - 1).all()
