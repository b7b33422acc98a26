"""Reconstruction of detectors whose tensors are not maps of one size: tokens, windows, regions."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import register, sized_batch

from mmdet_ptq.calibration import BlockReconstruction, FilteredGlobalLoss
from mmdet_ptq.calibration.reconstruction import closed_form
from mmdet_ptq.calibration.reconstruction.unit_training import UnitResult, UnitTrainer
from mmdet_ptq.config import GlobalLossConfig, ReconstructConfig
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import quantization_mode

LOW_BIT = dict(
    preset='w8a8_observe',
    weights=dict(bits=3),
    activations=dict(bits=4, observer=dict(type='mmdet_ptq.MinMaxObserver')),
)
EIGHT_BIT = dict(preset='w8a8_observe', activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')))


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    register(monkeypatch)


def mixed_sizes():
    # as many tokens lying as standing
    return [sized_batch(64, 96, seed=1), sized_batch(96, 64, seed=2), sized_batch(64, 96, seed=3)]


def run(detector, train, held_out, folder, **options):
    cfg = ReconstructConfig(**{'skip_below': 0, 'cache_gib': 1, **options})
    return BlockReconstruction(cfg).run(detector, train, held_out, folder, 0, False)


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['swin', 'cascade_rcnn', 'deformable_detr'])
def test_the_presets_reconstruction_helps_every_kind(kind, tmp_path):
    detector, _ = tiny_quantized(kind, LOW_BIT)
    batches = mixed_sizes() if kind == 'swin' else [tiny_batch(2, seed=i) for i in range(1, 4)]
    units = run(detector, batches[:2], batches[2:], tmp_path)
    assert all(unit['after'] <= unit['before'] for unit in units)
    assert sum(unit['after'] < 0.95 * unit['before'] for unit in units) > len(units) / 3


def test_queries_of_a_two_stage_detr_are_those_of_the_float_detector():
    detector, _ = tiny_quantized('two_stage_detr', LOW_BIT)
    data = detector.data_preprocessor(tiny_batch(2), False)
    with quantization_mode(detector, 'float'):
        teacher = predict_aligned(detector, data['inputs'], data['data_samples'])
    own = predict_aligned(detector, data['inputs'], data['data_samples'])
    paired = predict_aligned(detector, data['inputs'], data['data_samples'], teacher)
    assert not torch.equal(own.regions.queries[0], teacher.regions.queries[0])
    assert torch.equal(paired.regions.queries[0], teacher.regions.queries[0])
    loss = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0, iou_thr=0.0))
    paired, own = (sum(v for k, v in loss(x, teacher).items() if k.startswith('loss')) for x in (paired, own))
    assert paired < 0.9 * own


@pytest.mark.thorough
def test_channels_are_where_the_layer_has_them(tmp_path, monkeypatch):
    seen = {}

    def look(self, seed):
        for name, layer in self.data.layers.items():
            seen[name] = self.data, getattr(layer, 'out_features', None) or layer.out_channels
        return UnitResult(self.data.unit.name, 1.0, 1.0)

    monkeypatch.setattr(UnitTrainer, 'run', look)
    detector, _ = tiny_quantized('swin', EIGHT_BIT)
    run(detector, mixed_sizes(), [], tmp_path, granularity='layer', fisher=1)
    tokens = {'backbone.stages.0.blocks.0.ffn.layers.0.0': 16 * 24, 'backbone.stages.1.blocks.0.ffn.layers.1': 8 * 12}
    for name, (data, channels) in seen.items():
        of_channels = data.importance[0][1]
        assert of_channels.numel() == channels, name
        assert data.energy == pytest.approx(channels * data.variances[0]) or data.unit.calls > 1
    for name, count in tokens.items():
        assert sum(p.numel() for p in seen[name][0].importance[0][0]) == 6 * count, name


def test_images_lying_and_standing_are_not_mixed_in_one_call(tmp_path, monkeypatch):
    errors = {}

    def look(self, seed):
        errors[self.data.unit.name] = self.data.held_out_error()
        return UnitResult(self.data.unit.name, 1.0, 1.0)

    monkeypatch.setattr(UnitTrainer, 'run', look)
    # products in float: with right factors of 7 bits the last block alone costs more than 1 %
    detector, _ = tiny_quantized('swin', dict(EIGHT_BIT, products='float'))
    run(detector, mixed_sizes(), [], tmp_path, granularity='block', fisher=0, batch_size=8)
    blocks = {name: error for name, error in errors.items() if name.startswith('backbone.stages')}
    # 8 bits cost little; windows cut by the sizes of other images cost 4 % in the first block already
    assert len(blocks) > 4 and max(blocks.values()) < 0.01, blocks


@pytest.mark.thorough
def test_targets_in_a_block_are_the_float_detectors_after_its_first_layer_is_solved(tmp_path, monkeypatch):
    detector, _ = tiny_quantized('retinanet', LOW_BIT)
    untouched, batch, solved, expected = copy.deepcopy(detector), tiny_batch(2, seed=1), {}, {}
    seen_by = closed_form.seen_by

    def keep(data, name, call, inputs):
        seen = seen_by(data, name, call, inputs)
        if inputs is data.float_inputs[call][0]:
            solved.setdefault(name, seen[0][1])
        return seen

    monkeypatch.setattr(closed_form, 'seen_by', keep)
    run(detector, [batch], [], tmp_path, granularity='block', fisher=0, search_scales=False)
    layers = [name for name in solved if name.startswith('backbone')]
    assert len(layers) > 6
    for name in layers:
        untouched.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: expected.update({name: output.clone()})
        )
    with torch.no_grad(), quantization_mode(untouched, 'float'):
        untouched(untouched.data_preprocessor(batch, False)['inputs'], batch['data_samples'], mode='tensor')
    for name in layers:
        torch.testing.assert_close(solved[name], expected[name], msg=name)


@pytest.mark.thorough
def test_held_out_images_are_in_no_equation(tmp_path, monkeypatch):
    counted = {}
    add = closed_form.LayerEquations.add

    def count(self, x, y, counts=None):
        counted[id(self)] = counted.get(id(self), 0) + x.shape[2]
        add(self, x, y, counts)

    monkeypatch.setattr(closed_form.LayerEquations, 'add', count)
    detector, _ = tiny_quantized('retinanet', LOW_BIT)
    # a batch of three and what is left of it: nothing else is held out with them
    run(
        detector,
        [tiny_batch(3, seed=1)],
        [tiny_batch(1, seed=2)],
        tmp_path,
        granularity='layer',
        fisher=0,
        search_scales=False,
    )
    assert max(counted.values()) == 3 * 32 * 32
