"""The comparison of a runtime with the simulation, on a runtime that is the simulation itself."""

from __future__ import annotations

from collections import Counter

import architectures
import pytest
import torch

from mmdet_ptq.deploy.agreement import CHOSEN, compare_layer_inputs
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.predictions.queries import chosen_queries
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.names import call_name


@pytest.fixture
def detector(monkeypatch):
    architectures.register(monkeypatch)
    return tiny_quantized('two_stage_detr')[0]


@torch.no_grad()
def runtime(detector, image, change):
    """Chooses other queries than the simulation would: what each layer reads then, the outputs, and the choice."""
    inputs, own, calls = {}, [], Counter()

    def keep(name):
        def hook(module, args):
            inputs[call_name(name, calls[name])] = args[0].numpy().copy()
            calls[name] += 1

        return hook

    with chosen_queries(detector, None) as chosen:
        RawOutputs(detector)(image)
    given = [change(indices) for indices in chosen]
    layers = quantized_weights(detector)
    handles = [detector.get_submodule(name).register_forward_pre_hook(keep(name)) for name in layers]
    with chosen_queries(detector, given, own):
        outputs = RawOutputs(detector)(image)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(own, chosen, strict=True))
    return inputs, outputs, given


@pytest.mark.thorough
def test_the_simulation_goes_on_with_the_queries_that_the_runtime_chose(detector):
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    inputs, theirs, choices = runtime(detector, image, lambda indices: indices.flip(1))
    found, ours = {}, []
    for entry in compare_layer_inputs(detector, inputs, image, outputs=ours, choices=choices):
        found[entry.name] = entry.identical
    assert found.pop(CHOSEN) == 1 and set(found.values()) == {1}
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    alone = compare_layer_inputs(detector, inputs, image)
    assert min(entry.identical for entry in alone) < 0.9


@pytest.mark.thorough
def test_other_queries_than_the_simulations_are_told(detector):
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    inputs, _, choices = runtime(detector, image, lambda indices: (indices + 1) % 40)
    shared = {entry.name: entry for entry in compare_layer_inputs(detector, inputs, image, choices=choices)}[CHOSEN]
    assert shared.identical < 1
