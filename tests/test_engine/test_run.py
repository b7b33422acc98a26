"""What a run has loaded: its images and how they are shared out, its detector, and what it depends on."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from mmdet_ptq import PTQError
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.run import num_held_out, unwrapped
from mmdet_ptq.testing import SIZE, raw_outputs, tiny_batch
from mmdet_ptq.testing.calibrated import OBSERVE

NUMBERS = itertools.count()


@pytest.fixture(scope='module')
def build(config_file, one_thread, tmp_path_factory) -> Callable[..., PTQRunner]:
    """Builds runs of the tiny config with changes, in folders of their own."""

    def make(**ptq) -> PTQRunner:
        DetLocalVisualizer._instance_dict.pop('visualizer', None)
        cfg = Config.fromfile(config_file)
        cfg.ptq = {**OBSERVE, 'calibration': cfg.ptq.calibration, **ptq}
        cfg.work_dir = str(tmp_path_factory.mktemp('run') / 'work_dir')
        cfg.experiment_name = f'test_run_{next(NUMBERS)}'
        return PTQRunner.from_cfg(cfg)

    return make


@pytest.fixture(scope='module')
def observed(build) -> PTQRunner:
    """A run whose detector has its ranges."""
    runner = build()
    runner.load()
    runner.prepare()
    runner.observe()
    return runner


@pytest.fixture
def run(observed) -> PTQRunner:
    """The same, to be changed."""
    run = copy.copy(observed)
    run.detector = copy.deepcopy(observed.detector)
    return run


@pytest.fixture(scope='module')
def built(build) -> PTQRunner:
    return build()


@pytest.fixture
def small(built) -> PTQRunner:
    """A run of which nothing is loaded but its images, to be changed."""
    small = copy.copy(built)
    small.ptq = copy.deepcopy(built.ptq)
    return small


@pytest.mark.parametrize(
    'share, images, held', [(0.0, 10, 0), (0.125, 64, 8), (0.34, 6, 2), (0.01, 10, 0), (0.99, 3, 3), (0.5, 1, 0)]
)
def test_how_many_are_held_out(share, images, held):
    assert num_held_out(share, images) == held


def test_a_wrapper_is_taken_off_once_and_no_module_of_ones_own():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = nn.Identity()
    assert unwrapped(inner) is inner and isinstance(unwrapped(own := Wrapper(inner)), Wrapper) and own.module is inner
    MODEL_WRAPPERS.register_module(name='RunTestWrapper', module=Wrapper, force=True)
    assert unwrapped(Wrapper(inner)) is inner


# ------------------------------------------------------------------ loading


def test_the_float_checkpoint_is_loaded_and_the_float_detector_is_another_one(build):
    run = build()
    run.load()
    stored = torch.load(run.cfg.load_from, weights_only=True)['state_dict']
    for detector in (run.detector, run.float_detector):
        assert all(torch.equal(value, stored[name]) for name, value in detector.state_dict().items())
        assert not detector.training
    assert run.detector is not run.float_detector and run.model is run.float_detector
    with torch.no_grad():
        run.detector.backbone.conv1.weight.zero_()
    assert run.float_detector.backbone.conv1.weight.any()


def test_a_seed_that_cannot_be_one_is_named(make_runner):
    with pytest.raises(PTQError, match='`randomness.seed`'):
        make_runner({'randomness.seed': -1})


def test_what_a_run_depends_on_is_told_by_content(small, tmp_path):
    before, checkpoint = small.model_inputs(), small.checkpoint
    small.checkpoint = shutil.copy(checkpoint, tmp_path / 'moved.pth')
    assert small.model_inputs() == before
    state = torch.load(checkpoint, weights_only=True)
    state['state_dict']['backbone.conv1.weight'][0, 0, 0, 0] += 1
    torch.save(state, small.checkpoint)
    assert small.model_inputs()[:2] == before[:2] and small.model_inputs()[2] != before[2]


def test_the_quantized_detector_depends_on_its_numbers_and_its_canvas(run):
    before = run.quantized_inputs()
    assert run.quantized_inputs() == before
    run.canvas = (SIZE, 2 * SIZE)
    padded = run.quantized_inputs()
    run.canvas = None
    with torch.no_grad():
        run.detector.bbox_head.retina_cls.bias[0] += 1e-3
    assert len({before, padded, run.quantized_inputs()}) == 3


# ------------------------------------------------------------------ images


def ids(dataset) -> list[int]:
    return [dataset[i]['data_samples'].img_id for i in range(len(dataset))]


@pytest.mark.parametrize('holdout', [0.0, 0.34, 0.5])
def test_trained_and_held_out_images_are_all_of_them(small, holdout):
    train, held_out = small.split(holdout)
    assert len(held_out) == num_held_out(holdout, 6)
    assert ids(train) + ids(held_out) == list(small.calibration.ids) and len(set(small.calibration.ids)) == 6


def test_loaders_give_every_image_once(small):
    batches = list(small.calibration_loader())
    assert [len(batch['inputs']) for batch in batches] == [2, 2, 2]
    seen = [sample.img_id for batch in batches for sample in batch['data_samples']]
    assert seen == list(small.calibration.ids)
    assert [len(batch['inputs']) for batch in small.whole_loader(small.calibration, 4)] == [4, 2]


@pytest.mark.parametrize('count, expected', [(1, 1), (3, 3), (100, 6)])
def test_the_first_images_are_the_first(small, count, expected):
    seen = [sample.img_id for batch in small.first_images(count) for sample in batch['data_samples']]
    assert seen == list(small.calibration.ids)[:expected]


@pytest.mark.parametrize('ranks, size', [(1, 3), (2, 2)])
def test_shuffled_batches_never_end_and_show_all_alike(small, ranks, size, monkeypatch):
    monkeypatch.setattr(type(small), 'world_size', ranks)
    loader = small.endless_loader(small.calibration, 3)
    batches = list(islice(loader, 12 // size))
    assert {len(batch['inputs']) for batch in batches} == {size}
    seen = [sample.img_id for batch in batches for sample in batch['data_samples']]
    assert set(Counter(seen).values()) == {2} and len(set(seen)) == 6
    # in another order each time, and in the same one with the same seed
    assert seen[:6] != seen[6:]
    again = [
        s.img_id
        for batch in islice(small.endless_loader(small.calibration, 3), 12 // size)
        for s in batch['data_samples']
    ]
    assert again == seen


def test_one_image_is_the_first_and_can_be_run_again(run):
    call = run.one_image()
    first, again = call(), call()
    assert len(first) == 1 and first[0].img_id == run.calibration.ids[0]
    assert torch.equal(first[0].pred_instances.bboxes, again[0].pred_instances.bboxes)
    assert first[0].pred_instances.bboxes.numel()


# ------------------------------------------------------------------ sizes


def test_images_of_one_size_need_no_canvas(small):
    small.choose_canvas()
    assert small.canvas is small.largest is None and small.divisor == 0 and small.export_options == {}
    assert small.input_shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    'export_size, canvas, largest, options',
    [(None, (96, 64), None, {}), ((128, 96), (128, 96), None, {}), ('dynamic', None, (96, 64), dict(dynamic_size=32))],
)
def test_images_of_several_sizes_are_held_by_one(small, monkeypatch, export_size, canvas, largest, options):
    small.ptq.export_size = export_size
    monkeypatch.setattr(small.calibration, 'sizes', [(70, 40), (SIZE, SIZE)])
    small.choose_canvas()
    assert small.canvas == canvas and small.largest == largest and small.export_options == options
    assert small.input_shape == (1, 3, *(canvas or largest))


def test_a_canvas_that_holds_no_image_is_refused(small, monkeypatch):
    small.ptq.export_size = (64, 32)
    with pytest.raises(PTQError, match='`ptq.export_size` is 64x32 .* an image of 64x64'):
        small.choose_canvas()
    assert small.canvas is None


# ------------------------------------------------------------------ going on


def test_a_run_goes_on_with_the_state_of_a_stage(run):
    shown, kept = raw_outputs(run.detector, tiny_batch(1)), copy.deepcopy(run.detector_state())
    with torch.no_grad():
        run.detector.bbox_head.retina_cls.bias += 1
    changed = raw_outputs(run.detector, tiny_batch(1))
    run.go_on_from(kept['model'], kept['structure'])
    found = raw_outputs(run.detector, tiny_batch(1))
    assert all(torch.equal(a, b) for a, b in zip(found, shown, strict=True)) and not torch.equal(found[0], changed[0])
    assert run.structure.to_dict() == kept['structure'] and not hasattr(run.float_detector, 'ptq')


def test_a_checkpoint_tells_nothing_of_where_and_how_often_it_was_run(run):
    state = run.checkpoint_state()
    assert not {'work_dir', 'resume', 'launcher', 'experiment_name'} & state['config'].keys()
    assert {'model', 'ptq', 'test_dataloader'} <= state['config'].keys()
    assert str(run.work_dir) not in json.dumps(state['config'])
    stored = run.stored_bytes()
    run.write_quantized()
    assert stored == pytest.approx((run.folder / 'quantized.pth').stat().st_size, rel=0.02)


def test_a_part_begins_with_the_float_detector_in_a_folder_of_its_own(build, observed):
    run = build(export=['onnxruntime', 'ncnn'])
    # of another run: what it has done so far is no matter
    run.float_detector, run.structure, run.inputs = observed.float_detector, observed.structure, {'prepare': 'first'}
    (block,) = run.other_blocks
    part = run.part(block)
    assert block.export == ['ncnn'] and run.ptq.export == ['onnxruntime'] and run.runtimes == ['onnxruntime', 'ncnn']
    assert part.folder == Path(run.work_dir) / 'ncnn' and part.work_dir == run.work_dir and part.ptq is block
    assert not hasattr(part.detector, 'ptq') and part.structure is None and part.units == []
    assert part.detector is not run.float_detector is part.float_detector
    assert part.inputs['prepare'] == part.stage_inputs()['prepare'] != run.stage_inputs()['prepare']
    # the run goes on as it was
    assert run.structure is observed.structure and run.folder == Path(run.work_dir) and run.inputs['prepare'] == 'first'


def test_rows_are_written_as_they_come(run):
    run.results = dict(rows=[])
    run.add_row('float', {'coco/bbox_mAP': 0.5}, 1000, 2000)
    run.add_row('simulated', {'coco/bbox_mAP': 0.4}, 250, 500, remark='wrong here')
    with run.stages.timed('evaluate'):
        pass
    run.write_results()
    written = json.loads((Path(run.work_dir) / 'results.json').read_text())
    assert [row['model'] for row in written['rows']] == ['float', 'simulated']
    assert written['rows'][1]['remark'] == 'wrong here' and 'evaluate' in written['stages']
