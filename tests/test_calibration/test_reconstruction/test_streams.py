import copy

import pytest
import torch
from architectures import ARCHITECTURES, deformable_detr, register
from torch.utils._pytree import tree_leaves

from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.calibration.reconstruction.streams import FLOAT, QUANTIZED, Streams
from mmdet_ptq.calibration.reconstruction.units import find_passages, find_units
from mmdet_ptq.predictions import needs_reference, predict_aligned
from mmdet_ptq.testing import KINDS, tiny_batch, tiny_quantized
from mmdet_ptq.testing.models import MODELS
from mmdet_ptq.wrapping import quantization_mode


def make(kind, tmp_path, granularity='block', fisher=False):
    detector, _ = tiny_quantized(kind)
    detector.requires_grad_(False)
    data = [detector.data_preprocessor(tiny_batch(2, seed=i), False) for i in range(2)]
    images = data[0]['inputs'][:1].clone().requires_grad_()
    with quantization_mode(detector, 'float'):

        def run():
            predict_aligned(detector, images, data[0]['data_samples'][:1])

        units = find_units(detector, run, granularity)
        passages = find_passages(detector, run, units)
    streams = Streams(detector, units, ActivationStore(2**30, tmp_path), passages)
    for batch in data:
        streams.add(batch, needs_reference(detector), fisher)
    return detector, units, streams, data


def first(args, kwargs):
    return next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))


def whole_pass(detector, data, streams, unit, mode):
    """Inputs and outputs of every call of the unit in an ordinary forward pass."""
    seen = []
    module = detector.get_submodule(unit.name)
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append([first(args, kwargs).clone()]), prepend=True, with_kwargs=True
        ),
        module.register_forward_hook(lambda m, args, out: seen[-1].append(out.clone())),
    ]
    with torch.no_grad(), quantization_mode(detector, mode):
        for batch, kept in zip(data, streams.batches, strict=True):
            predict_aligned(detector, batch['inputs'], copy.deepcopy(batch['data_samples']), reference=kept.reference)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.thorough
@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(kind, marks=() if kind in ('retinanet', 'rtmdet') else pytest.mark.thorough)
        for kind in (*KINDS, *ARCHITECTURES)
    ],
)
def test_units_get_what_an_ordinary_pass_gives_them(kind, tmp_path, monkeypatch):
    register(monkeypatch)
    detector, units, streams, data = make(kind, tmp_path)
    # one whose products are quantized has a pass of its own
    before = [name for name, module in detector.named_modules() if 'forward' in vars(module)]
    assert before in ([], [''])
    for unit in units:
        float_inputs = streams.collect(unit, FLOAT)
        inputs = streams.collect(unit, QUANTIZED)
        expected = whole_pass(detector, data, streams, unit, 'float')
        for call in range(unit.calls):
            for batch in range(2):
                x, y = expected[batch * unit.calls + call]
                torch.testing.assert_close(streams.tensors(float_inputs[call][batch])[0], x)
                torch.testing.assert_close(streams.target(unit, call, batch), y)
        expected = whole_pass(detector, data, streams, unit, 'quantize')
        for call in range(unit.calls):
            for batch in range(2):
                x, y = expected[batch * unit.calls + call]
                torch.testing.assert_close(streams.tensors(inputs[call][batch])[0], x)
                with torch.no_grad():
                    again = streams.run(unit, call, inputs[call][batch], streams.tensors(inputs[call][batch]))
                torch.testing.assert_close(again, y)
        streams.forget(float_inputs)
        streams.finish(unit, inputs)
    # nothing but the images is left, and the detector is as it was
    assert len(streams.store._tensors) == 2
    assert [name for name, module in detector.named_modules() if 'forward' in vars(module)] == before


@pytest.mark.thorough
def test_each_unit_computes_once(tmp_path):
    detector, units, streams, _ = make('ssd', tmp_path)
    counts = dict.fromkeys((unit.name for unit in units), 0)
    layers = {unit.name: next(iter(unit.layers)) for unit in units}
    for name, layer in layers.items():

        def count(module, args, name=name):
            counts[name] += 1

        detector.get_submodule(layer).register_forward_pre_hook(count)
    for unit in units:
        streams.forget(streams.collect(unit, FLOAT))
        streams.finish(unit, streams.collect(unit, QUANTIZED))
    inside = [n for n in layers if layers[n] != n]  # hooks of a unit that is a layer itself fire for zeros, too
    # once in the float and once in the quantized stream, for each of two batches
    assert {counts[name] for name in inside} == {4}


def test_what_does_not_matter_is_left_out(tmp_path):
    detector, units, streams, _ = make('yolox', tmp_path)
    pools, called = [m for m in detector.modules() if isinstance(m, torch.nn.MaxPool2d)], []
    for pool in pools:
        pool.register_forward_pre_hook(lambda m, args: called.append(m))
    counts = {}
    for unit in units:
        float_inputs = streams.collect(unit, FLOAT)
        called.clear()
        inputs = streams.collect(unit, QUANTIZED)
        counts[unit.name] = len(called)
        streams.forget(float_inputs)
        streams.finish(unit, inputs)
    # two batches; whoever follows the block with the pools in it has no use for them
    assert {name for name, count in counts.items() if count} <= {'backbone.stage4.1'}
    assert len(pools) == 3 and not any(count for name, count in counts.items() if name.startswith('bbox_head'))


@pytest.mark.thorough
def test_float_inputs_of_as_many_units_as_fit_come_from_one_pass(tmp_path, monkeypatch):
    detector, units, streams, data = make('ssd', tmp_path)
    passes = []
    monkeypatch.setattr(
        'mmdet_ptq.calibration.reconstruction.streams.predict_aligned',
        lambda *args, **kwargs: (passes.append(1), predict_aligned(*args, **kwargs))[1],
    )
    streams.collect(units[0], FLOAT)
    assert len(passes) == len(data) and not streams.collect(units[1], FLOAT) == []
    assert len(passes) == len(data)
    _, units, streams, _ = make('ssd', tmp_path)
    streams.store.limit_bytes = 1
    passes.clear()
    for unit in units[:2]:
        streams.collect(unit, FLOAT)
    assert len(passes) == 2 * len(data)


@pytest.mark.thorough
def test_what_reaches_a_unit_through_a_detach_is_no_zero(tmp_path, monkeypatch):
    model = deformable_detr()
    model.update(with_box_refine=True)
    monkeypatch.setitem(MODELS, 'refined_detr', lambda: model)
    detector, units, streams, data = make('refined_detr', tmp_path, 'layer')
    # each unit in a pass of its own
    streams.store.limit_bytes = 1
    unit = next(unit for unit in units if unit.name == 'decoder.layers.1.cross_attn.output_proj')
    assert ('bbox_head.reg_branches.0.4', 0) in unit.needs[0]
    inputs = streams.collect(unit, FLOAT)
    for batch, (x, y) in enumerate(whole_pass(detector, data, streams, unit, 'float')):
        torch.testing.assert_close(streams.tensors(inputs[0][batch])[0], x)
        torch.testing.assert_close(streams.target(unit, 0, batch), y)


def test_fisher_weights_are_in_the_store_until_their_unit_is_finished(tmp_path):
    _, units, streams, data = make('retinanet', tmp_path, fisher=True)
    calls = sum(unit.calls for unit in units)
    assert len(streams.store._tensors) == len(data) * (1 + calls)
    unit = units[0]
    streams.forget(streams.collect(unit, FLOAT))
    streams.finish(unit, streams.collect(unit, QUANTIZED))
    assert all(len(batch.fisher) == calls - unit.calls for batch in streams.batches)
    assert not any((unit.name, 0) in batch.fisher for batch in streams.batches)
