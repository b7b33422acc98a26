"""Loading the trained float detector, and refusing what does not belong to it."""
from __future__ import annotations

from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..deploy import is_quantized_checkpoint
from ..errors import PTQError
from ..files import load_tensors


def load_float_checkpoint(detector: nn.Module, path: str) -> None:
    """Loads trained weights into a detector; every weight must be there and fit.

    Args:
        detector: The float detector.
        path: Local file, or an address mmengine's loader understands.

    Raises:
        PTQError: The file is missing, damaged or pickled, is a quantized checkpoint, or is of another
            architecture.
    """
    checkpoint = _read(path)
    if is_quantized_checkpoint(checkpoint):
        raise PTQError(f'{path!r} is already quantized; give the float checkpoint it was made from '
                       '(tools/test.py evaluates a quantized one).')
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise PTQError(f'{path!r} holds no `state_dict`; give a checkpoint written by mmdet.')
    state = {key.removeprefix('module.'): value for key, value in state.items() if isinstance(value, Tensor)}
    _check_fit(detector, state, path)
    detector.load_state_dict(state, strict=False)
    print_log(f'loaded the float detector from {path}', 'current')


def _read(path: str) -> object:
    if '://' not in path:
        return load_tensors(path)
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except Exception as error:  # network, cache and file back ends raise their own kinds
        raise PTQError(f'the checkpoint {path!r} cannot be fetched ({type(error).__name__}: {error}); download it '
                       'and give the local file.') from error


def _check_fit(detector: nn.Module, state: dict[str, Tensor], path: str) -> None:
    own = {k: v for k, v in detector.state_dict().items() if not k.endswith('num_batches_tracked')}
    missing = [k for k in own if k not in state and not k.startswith('data_preprocessor.')]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    wrong = missing + shapes
    if wrong:
        first = wrong[0]
        what = 'is missing' if first in missing else f'is {tuple(state[first].shape)}, not {tuple(own[first].shape)}'
        raise PTQError(f'the checkpoint {Path(path).name} does not fit the model: {len(wrong)} of {len(own)} '
                       f'tensors do not match (first: {first} {what}); give the checkpoint of this config.')
    extra = [k for k in state if k not in own and not k.endswith('num_batches_tracked')]
    if extra:
        print_log(f'{len(extra)} tensors of the checkpoint are not in the model and are ignored (first: {extra[0]})',
                  'current', level=30)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PTQError(f'the weight {key} of {Path(path).name} holds NaN or infinity; the checkpoint is '
                           'damaged, train or load it again.')
