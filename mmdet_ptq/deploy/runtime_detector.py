"""A runtime that answers like a detector: mmdet's data and decoding around an exported model."""
from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from ..compat import replace_sync_bn
from ..errors import PTQError
from .raw_outputs import check_exportable, nest_outputs
from .runtimes.base import Runtime


def runtime_detector(config: Config, runtime: Runtime, dataset_meta: dict | None = None) -> nn.Module:
    """Builds a detector whose network is an exported model.

    mmdet's data preprocessor, decoding and NMS are the config's own; weights of the config's detector are not used.

    Args:
        config: The config the model was exported from.
        runtime: The opened model.
        dataset_meta: Class names and palette, as mmdet keeps them. Defaults to None.

    Returns:
        A detector on the CPU, in eval mode, for mmdet's test loop and ``mmdet.apis.inference_detector``.

    Raises:
        PTQError: The config's detector has two stages.
    """
    from mmdet.registry import MODELS
    if config.get('custom_imports'):
        import_modules_from_strings(**config['custom_imports'])
    init_default_scope(config.get('default_scope', 'mmdet'))
    model = copy.deepcopy(config['model'])
    replace_sync_bn(model)
    if config.get('data_preprocessor'):
        model.setdefault('data_preprocessor', config['data_preprocessor'])
    return with_runtime(MODELS.build(model), runtime, config, dataset_meta)


def with_runtime(detector: nn.Module, runtime: Runtime, config: Config | None = None,
                 dataset_meta: dict | None = None) -> nn.Module:
    """Puts a runtime in place of a detector's network, in place.

    Args:
        detector: A detector of one stage.
        runtime: The opened model.
        config: Kept as ``detector.cfg``. Defaults to None.
        dataset_meta: Class names and palette. Defaults to None.
    """
    check_exportable(detector)
    device = next(detector.parameters()).device
    # only what decodes stays: the network's own parts would be dead weight
    detector.backbone = nn.Identity()
    if detector.with_neck:
        detector.neck = nn.Identity()
    detector.extract_feat = _Features()
    detector.bbox_head.forward = _RuntimeHead(runtime, device)
    detector.cfg, detector.dataset_meta = config, dataset_meta or {}
    return detector.eval()


class _Features:
    """Stands in for backbone and neck: the head's runtime reads the image itself."""

    def __call__(self, batch_inputs: Tensor) -> Tensor:
        return batch_inputs


class _RuntimeHead:
    """Stands in for the head's forward."""

    def __init__(self, runtime: Runtime, device: torch.device) -> None:
        self.runtime = runtime
        self.device = device

    def __call__(self, image: Tensor) -> Any:
        batches = [self._run(part) for part in self._parts(image)]
        flat = [torch.from_numpy(np.concatenate(outputs)).to(self.device) for outputs in zip(*batches, strict=True)]
        return nest_outputs(flat, self.runtime.meta['outputs'])

    def _parts(self, image: Tensor) -> list[Tensor]:
        if self.runtime.meta['dynamic_batch']:
            return [image]
        return list(image.split(self.runtime.meta['input_shape'][0]))

    def _run(self, image: Tensor) -> list[np.ndarray]:
        wanted = list(self.runtime.meta['input_shape'])
        if list(image.shape[1:]) != wanted[1:]:
            raise PTQError(
                f'the model was exported for images of {wanted[2]}x{wanted[3]} (height x width), the test pipeline '
                f'gives {image.shape[2]}x{image.shape[3]}; export it with --input-shape {image.shape[2]} '
                f'{image.shape[3]}, or make the pipeline pad to one size.')
        missing = 0 if self.runtime.meta['dynamic_batch'] else wanted[0] - len(image)
        if missing > 0:
            image = torch.cat([image, image.new_zeros(missing, *image.shape[1:])])
        outputs = self.runtime(image.detach().cpu().contiguous().numpy())
        return [output[:len(output) - missing] if missing > 0 else output for output in outputs]
