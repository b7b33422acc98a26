"""What layers read in ncnn: one run of the network that keeps every blob."""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor

from mmdet_ptq.deploy.ncnn.network import NcnnNetwork


def ncnn_inputs(path: str | os.PathLike, image: Tensor) -> dict[str, np.ndarray | None]:
    """What every call of a quantized layer reads in ncnn, before it is quantized.

    Args:
        path: The ``.param`` file.
        image: (1, C, H, W), normalized.

    Returns:
        Name of the layer, with ``#k`` for further calls, to the tensor, (1, ...); None where it is not quantized.

    Raises:
        PTQError: The package or a file is missing, or ncnn fails on the image.
    """
    network = NcnnNetwork(path, packing=False, keep=True)
    # what brings an input to codes has the name of the layer it stands before, and comes first
    reads: dict[str, str] = {}
    for layer in network.layers:
        for name in network.meta['layers']:
            if layer.name == name or layer.name.startswith(f'{name}_'):
                reads.setdefault(name, layer.bottoms[0])
    values = network.run(np.ascontiguousarray(image[0].cpu().numpy(), np.float32), list(reads.values()))
    found = {name: value[None] for name, value in zip(reads, values, strict=True)}
    for name, (sign, zero) in network.meta.get('shifts', {}).items():
        if name in found:
            found[name] = sign * (found[name] - zero)
    return {call.removesuffix('#0'): found.get(name) for name, call in network.meta['layers'].items()}
