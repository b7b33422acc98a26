"""Observing: calibration images through the float detector, ranges out, scales set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration.fisher import weigh_activations
from mmdet_ptq.errors import PTQError
from mmdet_ptq.progress import track
from mmdet_ptq.quantizers import Observer, build_observer
from mmdet_ptq.wrapping import Structure, quantization_mode
from mmdet_ptq.wrapping.state import STATE


@torch.no_grad()
def observe_activations(
    detector: nn.Module,
    batches: Iterable[Any],
    structure: Structure,
    weighed: Iterable[Any] | None = None,
    known: dict[str, Observer] | None = None,
) -> None:
    """Sets the scale and zero point of every activation quantizer.

    Args:
        detector: The prepared detector (see :func:`mmdet_ptq.wrapping.prepare_detector`), in eval mode.
        batches: Calibration batches as a dataloader yields them, the same on every rank: sums in another order, or
            batches of other images, would give other ranges.
        structure: The detector's structure, which names every activation's observer.
        weighed: Calibration batches that tell which values matter. Defaults to None: ``batches``.
        known: What was observed on the same images with another structure of the same detector, and is not observed
            again; what is observed is added. Defaults to None: nothing is known.

    Raises:
        PTQError: An activation is not finite (the layer is named), or no batch came.
    """
    state, known = getattr(detector, STATE), {} if known is None else known
    # the range of a sigmoid is known beforehand
    observed = {
        name: quantizer for name, quantizer in state.activations.items() if structure.activations[name].range is None
    }
    keys = {}
    for name, quantizer in observed.items():
        channels = {'num_channels': quantizer.num_channels, 'channel_axis': quantizer.channel_axis}
        cfg = {**structure.activations[name].observer, **channels}
        keys[name] = json.dumps([name, cfg], sort_keys=True)
        if keys[name] not in known:
            state.observers[name] = build_observer(cfg)
    try:
        if state.observers:
            _see(detector, batches, batches if weighed is None else weighed)
            known.update({keys[name]: observer for name, observer in state.observers.items()})
        for name, quantizer in observed.items():
            try:
                quantizer.fit_activation(known[keys[name]])
            except PTQError as error:
                raise PTQError(f'activation {name}: {error}') from error
    finally:
        state.observers.clear()
    print_log(f'{len(state.activations)} activation quantizers have their ranges', 'current')


def _see(detector: nn.Module, batches: Iterable[Any], weighed: Iterable[Any]) -> None:
    """Shows the calibration images to the observers that are there."""
    state = getattr(detector, STATE)
    state.only = frozenset(state.observers)
    try:
        with quantization_mode(detector, 'observe'):
            for batch in track(batches, description='observing activation ranges'):
                data = detector.data_preprocessor(batch, False)
                detector(**data, mode='predict')
    finally:
        state.only = None
    weigh_activations(detector, state.observers, weighed)
