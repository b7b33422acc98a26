"""Malformed inputs with fixed seeds, counted by outcome: each ends in one sentence, or is accepted and right.

``pytest -m '' -s tests/test_fuzz.py`` prints the counts.
"""

from __future__ import annotations

import copy
import json
import os
import random
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from asked import Otherwise, check_sections, check_structure
from hostile import OLD
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mutations import damaged, mutated

from mmdet_ptq import PTQError, cli, load_quantized
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import open_model, read_quantized, save_quantized
from mmdet_ptq.deploy.network.seal import BLANK, CHECKSUM, seal
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import predict, tiny_batch, tiny_config, tiny_detector
from mmdet_ptq.wrapping import Structure, integer_mac_share, prepare_detector

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
    reconstruct=dict(iters=10, holdout=0.25),
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
MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')  # takes no time
FORMATS = dict(
    preset='w4a8',
    weights=dict(bits=4, quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True), observer=MIN_MAX),
    activations=dict(bits=8, observer=dict(type='mmdet_ptq.PercentileObserver', percentile=99.9)),
    head=dict(
        weights=dict(bits=8, quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')),
        last=dict(activations=dict(bits=8, quantizer=dict(symmetric=False))),
    ),
    first=dict(weights=dict(bits=8), activations=dict(bits=8, observer=MIN_MAX)),
    last=dict(weights=dict(bits=8, quantizer=dict(type='mmdet_ptq.AffineQuantizer'))),
    overrides={
        'neck.*': dict(weights=dict(bits=8, float=False), activations=dict(bits=16)),
        'backbone.layer1': 'float',
        'backbone.layer2.0': dict(activations=dict(quantizer=dict(symmetric=True))),
        'bbox_head.retina_reg': dict(weights=dict(float=True)),
    },
)
# values that are good somewhere
GOOD = (
    'float',
    'float_outputs',
    'log_affine',
    'paper_w4a4',
    'w8a8_observe',
    5,
    16,
    False,
    dict(bits=3),
    dict(weights=dict(bits=6)),
    dict(activations=dict(bits=6), weights=dict(float=True)),
    dict(type='mmdet_ptq.AffineQuantizer', symmetric=True),
    dict(type='mmdet_ptq.LogAffineQuantizer', mode='auto'),
    dict(type='mmdet_ptq.PercentileObserver'),
)
STAGES = dict(
    FORMATS,
    calibration=dict(num_images=4, batch_size=2, seed=0),
    reconstruct=dict(iters=1, holdout=0.25, batch_size=2),
    global_loss=dict(iters=2, batch_size=2, lr=1e-3, holdout=0.25, augment=1),
)


def formats(there: Situation, draw: random.Random) -> tuple:
    """A block that is carried out as far as formats are chosen."""
    value, told = mutated(FORMATS, draw, (*there.traps, *GOOD))

    def act() -> None:
        detector = tiny_detector('retinanet')
        structure = prepare_detector(detector, PTQConfig.from_dict(value), lambda: predict(detector, tiny_batch(1)))
        check_structure(structure, value)

    return act, told


def calibrated(there: Situation, draw: random.Random) -> tuple:
    """A block that is carried out up to the file, in which the formats must stand."""
    value, told = mutated(STAGES, draw, (*there.traps, *GOOD))

    def act() -> None:
        cfg = copy.deepcopy(there.cfg)
        cfg.ptq = value
        runner = there.run(cfg)
        runner.calibrate()
        state = read_quantized(runner.folder / 'quantized.pth')
        check_structure(Structure.from_dict(state['structure']), value)
        images = min(value.get('calibration', {}).get('num_images', 256), 8)
        done = {key for key in ('reconstruct', 'global_loss') if value.get(key, {}) is not None}
        stages = {dict(reconstruct='reconstruct', global_loss='global')[key] for key in done}
        if len(runner.calibration) != images or not stages <= runner.stages.seconds.keys():
            raise Wrong(f'{len(runner.calibration)} images, stages {list(runner.stages.seconds)}')

    return act, told


def block(there: Situation, draw: random.Random) -> tuple:
    value, told = mutated(BLOCK, draw, there.traps)

    def act() -> None:
        read = PTQConfig.from_dict(value)
        if PTQConfig.from_dict(read.to_dict()).to_dict() != read.to_dict():
            raise Wrong('not the block that was read')
        check_sections(read.to_dict(), value)

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


def plain(value: object) -> dict:
    """The settings of an object."""
    simple = (str, int, float, bool, list, tuple, dict, type(None))
    filled = ('results', 'cat_ids', 'img_ids')  # when images are seen
    return {
        key: str(item)
        for key, item in vars(value).items()
        if isinstance(item, simple) and key not in filled and not key.startswith('_')
    }


def as_mmdet(runner: PTQRunner, cfg: Config) -> None:
    """Compares what a run has built with what mmdet builds from the same config."""
    cfg = copy.deepcopy(cfg)
    detector = MODELS.build(cfg.model).eval()
    load_float_checkpoint(detector, cfg.load_from)
    found, expected = (predict(each, tiny_batch(2)) for each in (runner.detector, detector))
    if str(detector) != str(runner.detector) or any(
        not torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        or not torch.equal(a.pred_instances.scores, b.pred_instances.scores)
        for a, b in zip(found, expected, strict=True)
    ):
        raise Wrong('another detector')
    loader, dataset = cfg.test_dataloader, DATASETS.build(cfg.test_dataloader.dataset)
    ours = runner.evaluation_dataset()
    infos, others = ([data.get_data_info(i) for i in range(len(data))] for data in (dataset, ours))
    if str(infos) != str(others) or loader.get('batch_size', 1) != runner._test_loop.dataloader.batch_size:
        raise Wrong('other evaluation images')
    metric = METRICS.build(cfg.test_evaluator)
    if plain(metric) != plain(runner._test_loop.evaluator.metrics[0]):
        raise Wrong('another metric')
    # calibration images come through the test pipeline
    train = DATASETS.build({**cfg.train_dataloader.dataset, 'test_mode': True, 'filter_cfg': None, 'pipeline': []})
    known = {train.get_data_info(i)['img_path'] for i in range(len(train))}
    if not {runner.calibration.datasets[d].get_data_info(i)['img_path'] for d, i in runner.calibration.index} <= known:
        raise Wrong('other calibration images')


def config(there: Situation, draw: random.Random) -> tuple:
    part = draw.choice(PARTS)
    value, told = mutated({part: there.cfg.to_dict()[part]}, draw)
    further = draw.random() < 0.1  # takes longer

    def act() -> None:
        cfg = there.cfg.to_dict()
        cfg.pop(part)
        cfg = Config({**cfg, **value})
        runner = there.run(copy.deepcopy(cfg))
        as_mmdet(runner, cfg)
        if further:
            runner.prepare()
            check_structure(runner.structure, cfg.ptq)
            if integer_mac_share(runner.structure) != 1:
                raise Wrong('a part of it is float')

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
--dry-run
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
            patch.setattr(PTQRunner, 'run', lambda self, dry=False: self.load())  # what follows takes long
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
    'ptq block, formats': (formats, 120),
    'ptq block, stages': (calibrated, 12),
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
    except (Wrong, Otherwise) as error:
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


@pytest.mark.parametrize(
    ('kind', 'count'), [('ptq block', 60), ('ptq block, formats', 25), ('float checkpoint', 10), ('exported model', 5)]
)
def test_a_part_of_the_malformed_inputs(there, kind, count):
    counts = check(there, kind, range(count))
    assert counts[SENTENCE]


# as many as take minutes where others compute, too; one run alone may
AT_ONCE, RUNS_AT_ONCE = 15, 1
# how the runs ended that are tests by themselves: one alone may be right
WHOLE_RUNS: dict[str, Counter] = defaultdict(Counter)
CHUNKS = [
    (kind, range(first, min(first + at_once, count)))
    for kind, (case, count) in KINDS.items()
    for at_once in [RUNS_AT_ONCE if case is calibrated else AT_ONCE]
    for first in range(0, count, at_once)
]


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'numbers'), CHUNKS, ids=str)
def test_every_malformed_input_ends_in_one_sentence_or_is_right(there, kind, numbers):
    counts = check(there, kind, numbers)
    if KINDS[kind][0] is calibrated:
        WHOLE_RUNS[kind].update(counts)
    else:
        assert counts[SENTENCE] > len(numbers) / 5


@pytest.mark.slow
@pytest.mark.parametrize('kind', [kind for kind, (case, _) in KINDS.items() if case is calibrated])
def test_more_than_a_fifth_of_the_whole_runs_end_in_a_sentence(kind):
    tried, count = WHOLE_RUNS[kind].total(), KINDS[kind][1]
    if tried < count:
        pytest.skip(f'{tried} of the {count} runs before it were made in this process')
    assert WHOLE_RUNS[kind][SENTENCE] > count / 5


def test_there_are_at_least_three_hundred():
    assert sum(count for _, count in KINDS.values()) >= 300
