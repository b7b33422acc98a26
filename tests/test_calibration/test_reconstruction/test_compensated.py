"""Weights whose rounding errors are made up for: nearer to the float layer, on the grid, within the bound."""

import pytest
import torch
from architectures import register

from mmdet_ptq.calibration.reconstruction import compensated
from mmdet_ptq.calibration.reconstruction.compensated import compensate_rounding
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.engine.stage_store import stage_inputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import SUM_LIMIT
from mmdet_ptq.testing import predict, raw_outputs, tiny_batch, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import float_weight, quantized_weights

BATCHES = [tiny_batch(2, seed=seed) for seed in (1, 2, 3, 4)]


def noise(detector, reference, batch) -> float:
    """Squared error of the raw outputs, over their variance."""
    pairs = zip(raw_outputs(detector, batch), raw_outputs(reference, batch), strict=True)
    return sum(float((a - b).square().mean() / b.var()) for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['retinanet', 'yolox', pytest.param('rtmdet', marks=pytest.mark.thorough)])
def test_outputs_come_nearer_to_those_with_float_weights(kind):
    detector, _ = tiny_quantized(kind, dict(preset='w8a8_observe', dataflow=None))
    reference, _ = tiny_quantized(kind, dict(preset='w8a8_observe', dataflow=None))
    for weight in quantized_weights(reference).values():
        weight.enabled = False
    others = [tiny_batch(2, seed=seed) for seed in (11, 12, 13)]
    before = sum(noise(detector, reference, batch) for batch in others)
    assert compensate_rounding(detector, BATCHES) == {}
    after = sum(noise(detector, reference, batch) for batch in others)
    assert after < 0.7 * before


@pytest.mark.parametrize('dataflow', ['speed', 'balanced', 'accuracy'])
def test_layers_whose_outputs_are_rounded_take_part(dataflow):
    detector, _ = tiny_quantized('retinanet', dict(OBSERVE, dataflow=dataflow))
    assert compensate_rounding(detector, BATCHES[:1]) == {}


@torch.no_grad()
def test_weights_are_values_of_their_grid_within_the_bound():
    detector, _ = tiny_quantized('retinanet')
    scales = {name: weight.quantizer.scale.clone() for name, weight in quantized_weights(detector).items()}
    before = {name: float_weight(detector.get_submodule(name)).clone() for name in scales}
    compensate_rounding(detector, BATCHES)
    moved = 0
    for name, weight in quantized_weights(detector).items():
        assert torch.equal(weight.quantizer.scale, scales[name])
        rows = weight.layout.to_rows(float_weight(detector.get_submodule(name)))
        # channels that are left alone are as they were
        changed = (rows != weight.layout.to_rows(before[name])).any(1)
        assert torch.equal(weight.quantizer(rows)[changed], rows[changed])
        codes = weight.quantizer.encode(rows).float()
        assert weight.quantizer.neighbours.largest_sum(codes).max() <= SUM_LIMIT
        nearest = weight.quantizer.encode(weight.layout.to_rows(before[name])).float()
        moved += int((codes != nearest).sum())
        assert (codes - nearest).abs().max() <= 16
    assert moved > 1000


@torch.no_grad()
def test_the_mean_of_what_a_layer_returns_stays():
    detector, _ = tiny_quantized('retinanet', dict(preset='w8a8_observe', weights=dict(bits=3), dataflow=None))
    name = next(name for name in quantized_weights(detector) if detector.get_submodule(name).bias is not None)
    layer, seen = detector.get_submodule(name), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.mean((0, 2, 3))))
    weight = quantized_weights(detector)[name]

    def mean(enabled):
        seen.clear()
        weight.enabled = enabled
        predict(detector, BATCHES[0])
        return torch.stack(seen).mean(0)

    wanted, rounded = mean(False), mean(True)
    compensate_rounding(detector, [BATCHES[0]])
    assert (mean(True) - wanted).abs().max() < 0.1 * (rounded - wanted).abs().max()


def test_it_is_the_same_every_time_and_leaves_the_generator():
    found = []
    for seed in (1, 2):
        detector, _ = tiny_quantized('ssd')
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        compensate_rounding(detector, BATCHES[:1])
        assert torch.equal(torch.get_rng_state(), state)
        found.append(detector.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_what_cannot_be_made_up_for_is_rounded_to_the_nearest_and_named(monkeypatch):
    said = []
    monkeypatch.setattr(compensated, 'print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr(compensated, 'MOST_WEIGHTS', 100)
    detector, _ = tiny_quantized('retinanet')
    before = {name: float_weight(detector.get_submodule(name)).clone() for name in quantized_weights(detector)}
    kept = compensate_rounding(detector, BATCHES[:1])
    sizes = {name: value[0].numel() for name, value in before.items()}
    assert kept.keys() == {name for name, size in sizes.items() if size > 100} and len(kept) < len(before)
    for name, value in before.items():
        assert torch.equal(float_weight(detector.get_submodule(name)), value) == (name in kept)
    assert f'{len(before) - len(kept)} of {len(before)} weights' in said[0]
    assert 'more than 100 weights' in said[1] and 'and' in said[1]


def test_weights_that_layers_share_stay():
    detector, _ = tiny_quantized('retinanet')
    first, second = detector.bbox_head.cls_convs[0].conv, detector.bbox_head.reg_convs[0].conv
    second.parametrizations.weight.original = float_weight(first)
    before = float_weight(first).clone()
    kept = compensate_rounding(detector, BATCHES[:1])
    assert kept == dict.fromkeys(
        ('bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv'),
        'it shares its weight or its bias with another layer',
    )
    assert torch.equal(float_weight(first), before)


def test_forwards_of_their_own_are_seen():
    detector, _ = tiny_quantized('retinanet')
    name = 'bbox_head.cls_convs.0.conv'
    layer = detector.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: forward(2 * x)
    assert compensate_rounding(detector, BATCHES[:1]) == {}  # it reads twice as much, and its weight tells the rest
    layer.forward = lambda x: 2 * forward(x)
    assert compensate_rounding(detector, BATCHES[:1]) == {name: 'its forward does more than its weight tells'}


@pytest.mark.parametrize('weights', [dict(float=True), dict(bits=16)])
def test_with_float_weights_and_with_16_bits_nothing_runs(weights):
    detector, _ = tiny_quantized('retinanet', dict(preset='w8a8_observe', weights=weights, dataflow=None))
    detector.register_forward_pre_hook(lambda module, args: pytest.fail('it runs'))
    assert compensate_rounding(detector, BATCHES[:1]) == {}


def test_layers_that_do_not_fit_in_memory_go_round_again(monkeypatch):
    passes = []
    whole, _ = tiny_quantized('retinanet')
    compensate_rounding(whole, BATCHES[:1])
    monkeypatch.setattr(compensated, 'MEMORY', 2**20)
    parts, _ = tiny_quantized('retinanet')
    parts.register_forward_pre_hook(lambda module, args: passes.append(1))
    assert compensate_rounding(parts, BATCHES[:1]) == {} and len(passes) > 1
    # later passes read what the layers before return with their new codes
    same = [
        torch.equal(float_weight(parts.get_submodule(name)), float_weight(whole.get_submodule(name)))
        for name in quantized_weights(parts)
    ]
    assert same[0] and not all(same)


@pytest.mark.parametrize(
    'kind',
    ['mask_rcnn', *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ('swin', 'deformable_detr', 'htc'))],
)
def test_regions_windows_and_queries_take_part(kind, monkeypatch):
    register(monkeypatch)
    detector, _ = tiny_quantized(kind, dict(OBSERVE, dataflow='balanced'))
    kept = compensate_rounding(detector, BATCHES[:1])
    assert set(kept.values()) <= {'a ConvTranspose2d of this kind is not covered'} and len(kept) <= 2


def test_layers_that_do_not_run_are_named():
    detector, _ = tiny_quantized('retinanet')
    detector.bbox_head.forward = lambda feats: tuple(
        [conv(feat) for feat in feats] for conv in (detector.bbox_head.retina_cls, detector.bbox_head.retina_reg)
    )
    kept = compensate_rounding(detector, BATCHES[:1])
    assert set(kept.values()) == {'it does not run'} and all('convs.0' in name for name in kept)


def test_calls_without_positions_count_for_nothing():
    """As of a head behind regions, where an image has none."""
    detector, _ = tiny_quantized('retinanet')
    layer, seen = detector.bbox_head.retina_cls, []
    detector.register_forward_pre_hook(
        lambda module, args: seen.append(len(layer(torch.zeros(0, layer.in_channels, 4, 4))))
    )
    assert compensate_rounding(detector, BATCHES[:1]) == {} and seen == [0]


def test_inputs_that_are_not_finite_leave_a_layer(monkeypatch):
    detector, _ = tiny_quantized('retinanet')
    layer = detector.bbox_head.retina_cls
    layer.register_forward_pre_hook(lambda module, args: (args[0] * torch.inf,))
    kept = compensate_rounding(detector, BATCHES[:1])
    assert kept['bbox_head.retina_cls']
    assert torch.isfinite(float_weight(layer)).all()


def test_the_key():
    assert PTQConfig.from_dict(dict(preset='w8a8')).rounding == 'nearest'
    assert PTQConfig.from_dict(dict(preset='w8a8_observe', rounding='compensated')).rounding == 'compensated'
    with pytest.raises(PTQError, match="`ptq.rounding` is 'compensate'.*Did you mean 'compensated'"):
        PTQConfig.from_dict(dict(preset='w8a8', rounding='compensate'))
    with pytest.raises(PTQError, match='both choose the codes of weights; remove one'):
        PTQConfig.from_dict(dict(preset='w4a4', rounding='compensated'))


def test_later_stages_take_its_place():
    for stage in (dict(reconstruct='closed_form'), dict(global_loss=dict())):
        assert PTQConfig.from_dict(dict(preset='w8a8_observe', **stage)).rounding == 'nearest'
    asked = PTQConfig.from_dict(dict(preset='w8a8', rounding='compensated'))
    assert asked.rounding == 'compensated' and asked.global_loss is not None
    with pytest.raises(PTQError, match='both choose the codes of weights'):
        PTQConfig.from_dict(dict(preset='w8a8_observe', reconstruct='closed_form', rounding='compensated'))


@torch.no_grad()
def test_a_channel_changes_only_if_that_helps_on_other_images():
    """What is rounded for one image alone fits that one, and not always the next."""
    found = []
    for judged in (False, True):
        detector, _ = tiny_quantized('ssd', dict(preset='w8a8_observe', weights=dict(bits=4), dataflow=None))
        before = {name: float_weight(detector.get_submodule(name)).clone() for name in quantized_weights(detector)}
        compensate_rounding(detector, [tiny_batch(1, seed=1)] * 3 + [tiny_batch(1, seed=2)] * judged)
        same = [
            float_weight(detector.get_submodule(name)).flatten(1) == value.flatten(1) for name, value in before.items()
        ]
        found.append(sum(int(rows.all(1).sum()) for rows in same))
    assert found[0] < found[1]


def test_runs_of_before_there_was_a_key_are_gone_on_with():
    recipe = PTQConfig.from_dict(dict(preset='w8a8')).to_dict()
    before = {key: value for key, value in recipe.items() if key != 'rounding'}
    assert stage_inputs(recipe) == stage_inputs(before)
    other = stage_inputs({**recipe, 'rounding': 'compensated'})
    assert other['observe'] != stage_inputs(before)['observe']
