"""Whether an ncnn network is the detector it was made from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.deploy.ncnn.format import NcnnLayer, write_network
from mmdet_ptq.deploy.ncnn.network import NcnnNetwork
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.flow import without_dataflow
from mmdet_ptq.wrapping.state import quantize_only

# what float outputs may differ by, in root mean squares against their spread: the order of sums stays far below, an
# operator that was converted wrongly does not
_LARGEST_DIFFERENCE = 1e-2


def verify(detector: nn.Module, example: Tensor, in_float: list[NcnnLayer], in_integers: list[NcnnLayer]) -> None:
    """Refuses a network that is not the detector: with float activations its outputs must be the detector's.

    Integers are no test of that: a code that rounds the other way may change many others behind it.
    """
    with torch.no_grad(), quantize_only(detector, (), set(quantized_weights(detector))):
        expected = _run_detector(detector, example)
    got = _run_ncnn(in_float, example)
    if [ours.shape for ours in expected] != [theirs.shape for theirs in got]:
        raise PTQError(
            f'the outputs have the shapes {[o.shape for o in got]} in ncnn and '
            f'{[o.shape for o in expected]} in the detector; export to another runtime.'
        )
    difference = _difference(expected, got)
    if not difference < _LARGEST_DIFFERENCE:
        raise PTQError(
            f"in float, ncnn's outputs differ from the detector's by {difference:.2g} of their standard "
            'deviation, because an operator means something else there; export to another runtime.'
        )
    with without_dataflow(detector):
        expected = _run_detector(detector, example)
    difference = _difference(expected, _run_ncnn(in_integers, example))
    print_log(
        f'ncnn: on noise, outputs differ from the simulation by {difference:.2g} of their standard deviation at most',
        'current',
    )


def _run_detector(detector: nn.Module, example: Tensor) -> list[np.ndarray]:
    device = next(detector.parameters()).device
    with torch.no_grad():
        return [output.cpu().numpy() for output in RawOutputs(detector)(example.to(device))]


def _run_ncnn(layers: list[NcnnLayer], example: Tensor) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        network = NcnnNetwork(write_network(layers, Path(folder), {}), packing=False)
        return [output[None] for output in network.run(example[0].numpy())]


def _difference(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest root mean square of a difference, against the output's standard deviation."""
    return max(
        float(np.sqrt(np.mean((ours - theirs) ** 2)) / max(ours.std(), 1e-6))
        for ours, theirs in zip(expected, got, strict=True)
    )
