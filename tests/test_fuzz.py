"""Malformed inputs with fixed seeds, counted by outcome: each ends in one sentence, or is accepted and right.

``pytest -m '' -s tests/test_fuzz.py`` prints the counts.
"""

from __future__ import annotations

import copy
import json
import os
import random
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hostile import OLD
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mutations import damaged, mutated

from mmdet_ptq import PTQError, cli, load_quantized
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import open_model, read_quantized, save_quantized
from mmdet_ptq.deploy.network.seal import BLANK, CHECKSUM, seal
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import tiny_config, tiny_detector

SENTENCE, RIGHT, TRACEBACK, SILENT, EXECUTED = 'one sentence', 'accepted and right', 'traceback', 'silent', 'executed'


class Wrong(Exception):
    """Something was accepted, and what came of it is wrong."""


def sealed_model() -> bytes:
    """A good model; the stored one is older than the checksum."""
    model = onnx.load(OLD / 'model.onnx')
    entry = next(e for e in model.metadata_props if e.key == 'mmdet_ptq')
    entry.value = json.dumps({**json.loads(entry.value), CHECKSUM: BLANK})
    return seal(model.SerializeToString())


class Situation:
    """What the cases start from: a tiny detector with its data, and good files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / 'canary'
        self.cfg = tiny_config('retinanet', folder)
        self.cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=3, batch_size=3))
        self.cfg.dump(folder / 'tiny.py')
        self.quantized = read_quantized(OLD / 'quantized.pth')
        self.loaded = load_quantized(OLD / 'quantized.pth').state_dict()
        self.float = torch.load(folder / 'float.pth', weights_only=True)
        self.image = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
        self.model = sealed_model()
        self.outputs = [np.asarray(value) for value in open_model(OLD / 'model.onnx')(self.image)]
        act = f'touch {self.canary}'
        # what would run, if a file could make it
        self.traps = (dict(type='os.system', command=act), dict(type='subprocess.run', args=act, shell=True))
        self.numbers = 0

    def file(self, name: str) -> Path:
        self.numbers += 1
        return self.folder / f'{self.numbers}_{name}'

    def run(self, cfg: Config) -> PTQRunner:
        """A run up to where its long work begins."""
        self.numbers += 1
        cfg.work_dir, cfg.experiment_name = str(self.folder / f'run_{self.numbers}'), f'fuzz_{self.numbers}'
        DetLocalVisualizer._instance_dict.pop('visualizer', None)
        runner = PTQRunner.from_cfg(cfg)
        runner.load()
        return runner


def same(found: dict, expected: dict) -> None:
    if found.keys() != expected.keys() or not all(torch.equal(found[key], expected[key]) for key in expected):
        raise Wrong('loaded with other numbers')


BLOCK = dict(
    preset='w4a8',
    weights=dict(bits=4, quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True)),
    activations=dict(bits=8, observer=dict(type='mmdet_ptq.PercentileObserver', percentile=99.9)),
    head=dict(weights=dict(bits=8), last=dict(activations=dict(bits=8))),
    first=dict(weights=dict(bits=8)),
    overrides={'neck.*': dict(weights=dict(bits=8, float=False))},
    calibration=dict(num_images=8, batch_size=2, seed=0),
    protect=dict(images=4, bops_ratio=0.5, candidates=['per_channel']),
    reconstruct=dict(type='mmdet_ptq.BlockReconstruction', iters=10, holdout=0.25),
    global_loss=dict(
        iters=10,
        lr=1e-3,
        optim_wrapper=dict(optimizer=dict(type='Adam')),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=10)],
        hooks=[dict(type='EMAHook')],
    ),
    dataflow='balanced',
    export=['onnxruntime'],
    export_size=[64, 64],
)


PTQConfig.from_dict(BLOCK)  # itself is good


def block(there: Situation, draw: random.Random) -> tuple:
    value, told = mutated(BLOCK, draw, there.traps)

    def act() -> None:
        read = PTQConfig.from_dict(value)
        if PTQConfig.from_dict(read.to_dict()).to_dict() != read.to_dict():
            raise Wrong('not the block that was read')

    return act, told


def quantized(there: Situation, draw: random.Random) -> tuple:
    path = there.file('quantized.pth')
    if draw.random() < 0.4:
        content, told = damaged((OLD / 'quantized.pth').read_bytes(), draw)
        path.write_bytes(content)
        return lambda: same(load_quantized(path).state_dict(), there.loaded), told
    state = copy.deepcopy(there.quantized)
    part = draw.choice(('config', 'structure', 'layers', 'input_shape', 'dataset_meta'))
    changed, told = mutated({part: state[part]}, draw, there.traps)
    state.pop(part)
    state.update(changed)

    try:
        save_quantized(path, state)
    except (TypeError, ValueError, KeyError, AttributeError):  # what no file can hold
        return quantized(there, draw)

    def act() -> None:
        detector = load_quantized(path)
        if not all(
            bool(torch.isfinite(value).all()) for key, value in detector.state_dict().items() if 'limit' not in key
        ):
            raise Wrong('numbers that are not finite')

    return act, told


def float_checkpoint(there: Situation, draw: random.Random) -> tuple:
    path = there.file('float.pth')
    if draw.random() < 0.5:
        content, told = damaged((there.folder / 'float.pth').read_bytes(), draw)
        path.write_bytes(content)
    else:
        state, told = mutated(there.float, draw, (*there.traps, 1j))
        torch.save(state, path)

    def act() -> None:
        detector = tiny_detector('retinanet', 1)
        load_float_checkpoint(detector, str(path))
        expected = there.float['state_dict']
        same({key: value for key, value in detector.state_dict().items() if key in expected}, expected)

    return act, told


def annotations(there: Situation, draw: random.Random) -> tuple:
    split = draw.choice(('train', 'val'))
    content = (there.folder / 'annotations' / f'instances_{split}.json').read_bytes()
    if draw.random() < 0.2:
        content, told = damaged(content, draw)
    else:
        value, told = mutated(json.loads(content), draw)
        content = json.dumps(value, default=str).encode()
    path = there.file('annotations.json')
    path.write_bytes(content)
    cfg = copy.deepcopy(there.cfg)
    if split == 'train':
        cfg.train_dataloader.dataset.ann_file = str(path)
    else:
        cfg.test_dataloader.dataset.ann_file = cfg.test_evaluator.ann_file = str(path)

    def act() -> None:
        runner = there.run(cfg)
        known = {image['id'] for image in json.loads(content)['images']} if split == 'train' else runner.calibration.ids
        if not set(runner.calibration.ids) <= set(known):
            raise Wrong('images that the file does not name')

    return act, f'{split}: {told}'


PARTS = ('test_dataloader', 'test_evaluator', 'train_dataloader', 'model', 'visualizer', 'env_cfg', 'default_hooks')


def config(there: Situation, draw: random.Random) -> tuple:
    part = draw.choice(PARTS)
    value, told = mutated({part: there.cfg.to_dict()[part]}, draw)

    def act() -> None:
        cfg = there.cfg.to_dict()
        cfg.pop(part)
        runner = there.run(Config({**cfg, **value}))
        if not len(runner.calibration) or not len(runner.evaluation_dataset()):
            raise Wrong('no images')

    return act, told


def exported(there: Situation, draw: random.Random) -> tuple:
    path = there.file('model.onnx')
    if draw.random() < 0.6:
        content, told = damaged(there.model, draw)
        path.write_bytes(content)
    else:
        model = onnx.load(OLD / 'model.onnx')
        entry = next(e for e in model.metadata_props if e.key == 'mmdet_ptq')
        meta, told = mutated(json.loads(entry.value), draw, there.traps)
        entry.value = json.dumps(meta, default=str)
        onnx.save(model, path)

    def act() -> None:
        found = [np.asarray(value) for value in open_model(path)(there.image)]
        if len(found) != len(there.outputs) or not all(map(np.array_equal, found, there.outputs)):
            raise Wrong('other outputs')

    return act, told


OPTIONS = """
--preset w8a9
--preset w4a8
--preset
--seed -1
--seed x
--seed 5
--fast
--resume
--device gpu
--device cpu
--device cuda:9
--launcher mpi
--launcher pytorch
--launcher ssh
--work-dir /dev/null/x
--images 0
--images two
--cfg-options x
--cfg-options ptq.weights.bits=[1
--unheard-of
--cfg-options model=3
--cfg-options ptq.export=ncnnn
--cfg-options a.b.c=1
--cfg-options load_from=absent.pth
--cfg-options test_dataloader=None
--to ncnnn
--to onnxruntime --input-shape 0 -5
--to onnxruntime --out /dev/null/x
"""


def command_line(there: Situation, draw: random.Random) -> tuple:
    good, files = [str(there.folder / 'tiny.py')], ('tiny.py', 'float.pth', 'absent', 'train', 'annotations')
    options = [line.split() for line in OPTIONS.split('\n') if line]
    name = draw.choice(('ptq', 'ptq', 'analyze', 'test', 'export'))
    arguments = [str(there.folder / draw.choice(files)) for _ in range(draw.randint(0, 2))]
    arguments = (good if draw.random() < 0.6 and name != 'export' else []) + arguments
    for option in draw.sample(options, draw.randint(0, 2)):
        arguments += option

    def act() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(there.folder)
            for key in ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK'):
                patch.setenv(key, os.environ.get(key, '0'))
            patch.setattr(PTQRunner, 'run', PTQRunner.load)  # what follows takes long
            patch.setattr('mmdet_ptq.engine.analyze.analyze', lambda cfg, images: PTQRunner.from_cfg(cfg).load())
            DetLocalVisualizer._instance_dict.pop('visualizer', None)
            try:
                getattr(cli, name)(arguments)
            except SystemExit as end:
                if end.code != 2:
                    raise Wrong(f'exit code {end.code}') from end
                raise PTQError('what the command line told') from end

    return act, f'{name} {" ".join(arguments)}'


# kind of input: what makes a case, and how many there are
KINDS = {
    'ptq block': (block, 150),
    'quantized.pth': (quantized, 60),
    'float checkpoint': (float_checkpoint, 60),
    'annotations': (annotations, 60),
    'config': (config, 150),
    'exported model': (exported, 50),
    'command line': (command_line, 50),
}


@pytest.fixture(scope='module')
def there(tmp_path_factory) -> Situation:
    return Situation(tmp_path_factory.mktemp('fuzz'))


def outcome(there: Situation, kind: str, number: int) -> tuple[str, str]:
    """How a case ends, and what it was."""
    act, told = KINDS[kind][0](there, random.Random(f'{kind} {number}'))
    try:
        act()
        end = RIGHT
    except PTQError as error:
        end = SENTENCE
        if '\n' in str(error) or not str(error):
            end, told = TRACEBACK, f'{told}: {error}'
    except Wrong as error:
        end, told = SILENT, f'{told}: {error}'
    except Exception:
        end, told = TRACEBACK, f'{told}: {traceback.format_exc()[-1500:]}'
    if there.canary.exists():
        there.canary.unlink()
        end = EXECUTED
    return end, f'{kind} {number}: {told}'


def check(there: Situation, kind: str, numbers: range) -> Counter:
    ends = [outcome(there, kind, number) for number in numbers]
    bad = [f'{end}: {told}' for end, told in ends if end not in (SENTENCE, RIGHT)]
    counts = Counter(end for end, _ in ends)
    print(f'\n{kind}: {len(ends)} tried, {dict(counts)}')
    assert not bad, '\n\n'.join(bad)
    return counts


@pytest.mark.parametrize(('kind', 'count'), [('ptq block', 60), ('float checkpoint', 10), ('exported model', 5)])
def test_a_part_of_the_malformed_inputs(there, kind, count):
    counts = check(there, kind, range(count))
    assert counts[SENTENCE]


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_every_malformed_input_ends_in_one_sentence_or_is_right(there, kind):
    counts = check(there, kind, range(KINDS[kind][1]))
    assert counts[SENTENCE] > KINDS[kind][1] / 5


def test_there_are_at_least_three_hundred():
    assert sum(count for _, count in KINDS.values()) >= 300
