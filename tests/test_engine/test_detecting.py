"""What is written beside a model: an end-to-end model and its program, or why there is none."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdet_ptq.deploy import Runtime
from mmdet_ptq.deploy.network.program import PROGRAM, Opening
from mmdet_ptq.engine.detecting import END2END, detecting_files, export_detecting, program_of
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, tiny_detector

SHAPE = (1, 3, SIZE, SIZE)
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True),
    dict(type='PackDetInputs'),
]


class Toy(Runtime):
    """A runtime whose models are files of a few words."""

    name, suffix, end2end = 'toy', '.toy', True
    opening = Opening('toylib', 'model = toylib.open(path)', 'model.run(tensor, size)')
    given: list = []

    @classmethod
    def export(cls, detector: nn.Module, folder: Path, shape: tuple, **options) -> None:
        cls.given.append((detector, shape, options))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'model{cls.suffix}').write_text('a model')


@pytest.fixture(scope='module')
def detector() -> nn.Module:
    detector = tiny_detector('retinanet')
    detector.dataset_meta = dict(classes=('red', 'green', "bl'ue"))
    return detector


@pytest.fixture
def cfg() -> Config:
    return Config(dict(test_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=copy.deepcopy(PIPELINE)))))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr('mmdet_ptq.engine.detecting.print_log', lambda text, *_: lines.append(text))
    monkeypatch.setattr(Toy, 'given', [])
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def assigned(program: str) -> dict:
    """The constants of a program."""
    values = {}
    for node in ast.parse(program).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                values[node.targets[0].id] = ast.unparse(node.value)
    return values


def test_a_model_and_its_program_are_written_and_listed(detector, cfg, said, tmp_path):
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    assert names(tmp_path) == sorted([PROGRAM, f'{END2END}/model.toy'])
    assert detecting_files(tmp_path) == [tmp_path / PROGRAM, tmp_path / END2END / 'model.toy']
    ((given, shape, options),) = Toy.given
    assert given is not detector and shape == SHAPE and options == dict(end2end=True)
    assert torch.equal(given.backbone.conv1.weight, detector.backbone.conv1.weight)
    assert said == [f'toy: {tmp_path / PROGRAM} detects without mmdet']
    text = (tmp_path / PROGRAM).read_text()
    values = assigned(text)
    assert tuple(values['CLASSES']) == ('red', 'green', "bl'ue")
    assert values['MODEL'] == f"Path(__file__).parent / '{END2END}/model.toy'"
    assert 'import toylib' in text and 'model = toylib.open(path)' in text and 'mmdet_ptq' not in text


def test_what_an_earlier_run_wrote_is_gone_where_nothing_is_written(detector, cfg, said, tmp_path, monkeypatch):
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    (tmp_path / END2END / 'model.bin').write_text('weights')
    (tmp_path / 'model.toy').write_text("the run's model")
    monkeypatch.setattr(Toy, 'end2end', False)
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    assert names(tmp_path) == ['model.toy'] and len(Toy.given) == 1
    assert said[1] == f'toy: no end-to-end model and no {PROGRAM}: its models cannot suppress'


@pytest.mark.parametrize(
    'options, cfg_of, told',
    [
        (
            dict(dynamic_size=32),
            lambda cfg: cfg,
            'they take images of one size, and sizes are open (`ptq.export_size`)',
        ),
        ({}, lambda cfg: None, 'there is no config, whose test pipeline it repeats'),
        ({}, lambda cfg: Config({}), 'the config has no `test_dataloader.dataset.pipeline`, which calibration images'),
    ],
)
def test_what_stands_in_the_way_is_told(detector, cfg, said, tmp_path, options, cfg_of, told):
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg_of(cfg), options)
    assert names(tmp_path) == [] and Toy.given == []
    assert said[0].startswith(f'toy: no end-to-end model and no {PROGRAM}: {told}') and not said[0].endswith('.')


def test_sizes_that_are_closed_are_no_hindrance(detector, cfg, said, tmp_path):
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg, dict(dynamic_size=0))
    assert (tmp_path / PROGRAM).is_file()


@pytest.mark.parametrize(
    'error, told',
    [
        (PTQError('the model is too large.'), 'the model is too large'),
        (RuntimeError('first line\n  and second.'), 'RuntimeError: first line and second'),
        (MemoryError(), 'MemoryError'),
    ],
)
def test_an_exporter_that_fails_breaks_no_run(detector, cfg, said, tmp_path, monkeypatch, error, told):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Toy, 'export', fail)
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    assert names(tmp_path) == []
    assert said[0].startswith(f'toy: no end-to-end model and no {PROGRAM}: {told}') and not said[0].endswith('.')


@pytest.mark.parametrize('part', ['export', 'write_text'])
def test_what_a_failure_leaves_is_removed(detector, cfg, said, tmp_path, monkeypatch, part):
    def leave(detector, folder, *args, **kwargs):
        folder.mkdir()
        for name in ('model.toy', 'model.bin'):
            (folder / name).write_text('half a model')
        raise RuntimeError('the runtime cannot open it')

    def fail(*args):
        assert (tmp_path / END2END / 'model.toy').is_file()
        raise PTQError('cannot write it.')

    (tmp_path / 'model.toy').write_text("the run's model")
    if part == 'export':
        monkeypatch.setattr(Toy, 'export', leave)
    else:
        monkeypatch.setattr('mmdet_ptq.engine.detecting.write_text', fail)
    export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    assert detecting_files(tmp_path) == [] and names(tmp_path) == ['model.toy']
    assert said[0].startswith(f'toy: no end-to-end model and no {PROGRAM}: ')


def test_an_interruption_is_none_of_its_failures(detector, cfg, said, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Toy, 'export', interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_detecting(detector, Toy, tmp_path, SHAPE, cfg)
    assert said == []


def test_the_program_needs_no_classes_and_knows_its_steps(cfg):
    plain = tiny_detector('retinanet')
    assert len(assigned(program_of(plain, Toy, SHAPE, cfg, 'model.toy'))['CLASSES']) == 0
    plain.dataset_meta = None
    program = program_of(plain, Toy, (1, 3, 96, 32), cfg, 'model.toy')
    assert 'HEIGHT, WIDTH = 96, 32' in program.replace('(', '').replace(')', '')
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='RandomFlip', prob=0.5))
    with pytest.raises(PTQError, match='the test pipeline has RandomFlip, which is unknown'):
        program_of(plain, Toy, SHAPE, cfg, 'model.toy')


def test_only_what_it_writes_is_listed(tmp_path):
    assert detecting_files(tmp_path) == [] == detecting_files(tmp_path / 'absent')
    (tmp_path / END2END / 'model.folder').mkdir(parents=True)
    for name in ('model.onnx', 'model.bin', 'notes.txt', 'model'):
        (tmp_path / END2END / name).write_text('')
    (tmp_path / 'model.onnx').write_text('')
    assert [path.name for path in detecting_files(tmp_path)] == ['model.bin', 'model.onnx']
    (tmp_path / PROGRAM).write_text('')
    assert [path.name for path in detecting_files(tmp_path)] == [PROGRAM, 'model.bin', 'model.onnx']
