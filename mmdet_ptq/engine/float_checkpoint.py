"""Loading the trained float detector, and refusing what does not belong to it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmdet_ptq.deploy import is_quantized_checkpoint
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import check_tensor, load_tensors

# what trackers and semi-supervised detectors call the one that detects
PARTS = ('detector.', 'teacher.')


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
        raise PTQError(
            f'{path!r} is already quantized; give the float checkpoint it was made from '
            '(tools/test.py evaluates a quantized one).'
        )
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise PTQError(f'{path!r} holds no `state_dict`; give a checkpoint written by mmdet.{_elsewhere(checkpoint)}')
    strange = next((key for key in state if not isinstance(key, str)), None)
    if strange is not None:
        raise PTQError(
            f'the `state_dict` of {Path(path).name} has the key {strange!r:.60}, a {type(strange).__name__}, where '
            'names of weights should be; give a checkpoint written by mmdet.'
        )
    twice = next((key for key in state if key.startswith('module.') and key.removeprefix('module.') in state), None)
    if twice is not None:
        raise PTQError(
            f'the `state_dict` of {Path(path).name} has the weight {twice:.100} and, without `module.`, another one; '
            'give a checkpoint written by mmdet.'
        )
    tensors = OrderedDict(
        (key.removeprefix('module.'), value) for key, value in state.items() if isinstance(value, Tensor)
    )
    # tells layers of which version of theirs the tensors are: mmdet's rename those of early ones
    metadata = getattr(state, '_metadata', None)
    tensors._metadata = {
        key.removeprefix('module.'): value
        for key, value in (metadata.items() if isinstance(metadata, dict) else ())
        if isinstance(key, str) and isinstance(value, dict)
    }
    tensors = _own_part(tensors, detector)
    _check_kinds(tensors, detector, path)
    _check_finite(tensors, path)
    _load(detector, tensors, path)
    print_log(f'loaded the float detector from {path}', 'current')


def _read(path: str) -> object:
    if '://' not in path:
        return load_tensors(path)
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except Exception as error:  # network, cache and file back ends raise their own kinds
        raise PTQError(
            f'the checkpoint {path!r} cannot be fetched ({type(error).__name__}: {error}); download it '
            'and give the local file.'
        ) from error


def _elsewhere(checkpoint: object) -> str:
    """Where a checkpoint of another program, or of an average of weights alone, has its tensors."""
    parts = [('', checkpoint)]
    for name, part in parts:  # grows
        if not isinstance(part, dict) or name.count('.') > 2:
            continue
        if name and any(isinstance(value, Tensor) for value in part.values()):
            return f' Its tensors stand in {name[1:]!r:.100}: save them as dict(state_dict=...) by torch.save.'
        parts += [(f'{name}.{key}', value) for key, value in part.items() if isinstance(key, str)]
    return ''


def _prefix(state: dict[str, Tensor], own: Iterable[str]) -> str:
    """What all names of the detector's weights begin with in a checkpoint, and not in the detector."""
    first, *others = own
    found = [key.removesuffix(first) for key in state if key.endswith(f'.{first}')]
    return next((prefix for prefix in found if all(f'{prefix}{key}' in state for key in others)), '')


def _own_part(state: OrderedDict, detector: nn.Module) -> OrderedDict:
    """The tensors of the detector, where they are those of something larger that holds it."""
    own = [key for key in detector.state_dict() if not _is_counter(key) and not key.startswith('data_preprocessor.')]
    for part in PARTS:
        if all(f'{part}{key}' in state for key in own) and not any(key in state for key in own):
            print_log(f'the checkpoint is of more than a detector: what is called {part}* in it is taken', 'current')
            inner = OrderedDict((k.removeprefix(part), v) for k, v in state.items() if k.startswith(part))
            inner._metadata = {k.removeprefix(part): v for k, v in state._metadata.items() if k.startswith(part)}
            return inner
    return state


def _check_kinds(state: dict[str, Tensor], detector: nn.Module, path: str) -> None:
    """Refuses what cannot be the numbers of a weight."""
    own = detector.state_dict()
    for key, value in state.items():
        wrong = check_tensor(value)
        if not wrong and value.is_complex():
            wrong = 'is complex'
        if not wrong and key in own and own[key].is_floating_point() and not value.is_floating_point():
            wrong = f'holds {str(value.dtype).removeprefix("torch.")} where the detector has real numbers'
        if wrong:
            raise PTQError(
                f'the weight {key:.100} of {Path(path).name} {wrong}; give the float checkpoint that mmdet wrote.'
            )


def _check_finite(state: dict[str, Tensor], path: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and value.element_size() == 1:
            value = value.float()  # torch compares no numbers of 8 bits
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PTQError(
                f'the weight {key} of {Path(path).name} holds NaN or infinity; the checkpoint is '
                'damaged, train or load it again.'
            )
        if key.endswith('running_var') and (value < 0).any():
            raise PTQError(
                f'the weight {key} of {Path(path).name} holds a variance below zero; the checkpoint is damaged, train '
                'or load it again.'
            )


def _load(detector: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Loads the tensors; what is missing or left over is known only after layers have renamed those of their past."""
    own = {key: value for key, value in detector.state_dict().items() if not _is_counter(key)}
    try:
        missing, extra = detector.load_state_dict(state, strict=False)
    except RuntimeError as error:
        shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
        first = shapes[0] if shapes else None
        told = (
            f'{first} is {tuple(state[first].shape)}, not {tuple(own[first].shape)}'
            if shapes
            else ' '.join(str(error).splitlines()[-1].split()).rstrip('.')
        )
        missing = [key for key in own if key not in state and not key.startswith('data_preprocessor.')]
        raise _misfit(path, len(shapes or (1,)) + len(missing), len(own), told) from error
    missing = [key for key in missing if not _is_counter(key) and not key.startswith('data_preprocessor.')]
    if missing:
        prefix = _prefix(state, [key for key in own if not key.startswith('data_preprocessor.')])
        if prefix:
            raise PTQError(
                f'all weights of {Path(path).name} have names that begin with {prefix!r:.100}, and those of the '
                'detector do not; save them without it.'
            )
        raise _misfit(path, len(missing), len(own), f'{missing[0]} is missing')
    extra = [key for key in extra if not _is_counter(key)]
    if extra:
        print_log(
            f'{len(extra)} tensors of the checkpoint are not in the model and are ignored (first: {extra[0]})',
            'current',
            level=logging.WARNING,
        )


def _is_counter(key: str) -> bool:
    return key.endswith('num_batches_tracked')


def _misfit(path: str, wrong: int, count: int, first: str) -> PTQError:
    return PTQError(
        f'the checkpoint {Path(path).name} does not fit the model: {wrong} of {count} tensors do not match '
        f'(first: {first}); give the checkpoint of this config.'
    )
