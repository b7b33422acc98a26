"""Opening and running an ncnn network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_ptq.deploy.ncnn.format import NcnnLayer, param_meta, parse_param
from mmdet_ptq.deploy.network.meta import check_meta
from mmdet_ptq.deploy.network.seal import CHECKSUM, check_seal
from mmdet_ptq.deploy.requirements import require
from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import Malformed
from mmdet_ptq.limits import MIB

# of a .param: a line a layer
MOST_TEXT = 64 * MIB
NCNN = ('ncnn>=1.0.20250503',)
# what its layers return when they get no memory
_NO_MEMORY = -100


class NcnnNetwork:
    """A network that :func:`mmdet_ptq.deploy.ncnn.export.export_ncnn` wrote.

    Args:
        path: The ``.param``; the ``.bin`` of the same name lies beside it.
        threads: Threads of one inference. Defaults to 1.
        packing: Let ncnn interleave channels, as it does by default: about twice as fast, but its packed int8
            depthwise convolutions on x86 take approximate reciprocals of the scales, off by 2.4e-4. Without packing
            integer networks give the simulation's codes. Defaults to True.
        keep: Keep every blob of a run, so that any can be read. Defaults to False.

    Attributes:
        layers: The layers, without their weights.
        meta: What the file says about itself.

    Raises:
        PTQError: The package or a file is missing, or a file is truncated or not ours.
    """

    def __init__(self, path: str | os.PathLike, threads: int = 1, packing: bool = True, keep: bool = False) -> None:
        require(*NCNN, extra='ncnn')
        self.layers, self.meta, weights = _read(Path(path))
        names = {blob for layer in self.layers for blob in layer.tops}
        self._outputs = [f'out{i}' for i in range(len(names)) if f'out{i}' in names]
        import ncnn

        self._mat: Any = ncnn.Mat
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads = threads
        options.use_int8_inference = True
        options.use_packing_layout = packing
        options.lightmode = not keep
        # what is not quantized stays in full precision
        for name in ('vulkan_compute', 'fp16_packed', 'fp16_storage', 'fp16_arithmetic', 'bf16_packed', 'bf16_storage'):
            if hasattr(options, f'use_{name}'):
                setattr(options, f'use_{name}', False)
        if self._net.load_param(str(path)):
            raise PTQError(f'ncnn cannot load {str(path)!r}; it was made for another version of ncnn, export it again.')
        if self._net.load_model(str(weights)):
            raise PTQError(f'ncnn cannot load {str(weights)!r}; export it again.')

    def run(self, image: np.ndarray, blobs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Runs one image.

        Args:
            image: (C, H, W), float32, contiguous.
            blobs: What is read. Defaults to None: the detector's raw outputs in order.

        Returns:
            What was asked for, without the batch axis.

        Raises:
            PTQError: ncnn fails on the image.
        """
        extractor = self._net.create_extractor()
        # a copy: a layer that works in place asks who else has the blob, and crashes on memory that is not ncnn's
        blob = self._mat(image).clone()
        extractor.input('in0', blob)
        results = []
        for name in self._outputs if blobs is None else blobs:
            status, output = extractor.extract(name)
            if status == _NO_MEMORY:
                raise PTQError(
                    f'ncnn has not enough memory for an image of shape {image.shape}; export the network again, its '
                    'file may have been made to take more.'
                )
            if status:
                raise PTQError(
                    f'ncnn fails on an image of shape {image.shape} (status {status}); give images of the '
                    'shape that was exported.'
                )
            results.append(np.array(output))
        return results


def _read(param: Path) -> tuple[list[NcnnLayer], dict, Path]:
    """Layers, meta and the path of the weights, after all checks that need no ncnn."""
    weights = param.with_suffix('.bin')
    for file in (param, weights):
        if not file.is_file():
            raise PTQError(f'there is no file {str(file)!r}; an ncnn network is a .param and a .bin of one name.')
    if param.stat().st_size > MOST_TEXT:
        raise PTQError(f'{str(param)!r} is longer than {MOST_TEXT // MIB} MiB, which no network is; export it again.')
    try:
        text = param.read_text(encoding='ascii')
        layers, meta = parse_param(text), param_meta(text)
    except (PTQError, UnicodeDecodeError):
        raise PTQError(f'{str(param)!r} is no ncnn .param file, or only a part of one; export it again.') from None
    if not isinstance(meta, dict) or not isinstance(meta.get('weights'), int):
        raise PTQError(
            f'{str(param)!r} was not exported by mmdet-ptq, or is only a part of such a file; make one with '
            'tools/export.py.'
        )
    if weights.stat().st_size != meta['weights']:
        raise PTQError(
            f'{str(weights)!r} has {weights.stat().st_size} bytes instead of {meta["weights"]}: it is '
            'truncated or belongs to another .param; export it again.'
        )
    if 'format' in meta:
        try:
            check_meta(meta)
        except Malformed as error:
            raise PTQError(f'{str(param)!r} is damaged: {error}; export it again with tools/export.py.') from error
    check_seal(meta.pop(CHECKSUM, None), param, weights)
    return layers, meta, weights
