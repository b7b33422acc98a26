"""What functional operations do to quantized tensors: move their values, compute new ones, or something unknown."""

from __future__ import annotations

from math import inf
from typing import Any

from torch import Tensor

LAYER, MOVEMENT, ARITHMETIC, UNKNOWN = 'layer', 'movement', 'arithmetic', 'unknown'

# every output value is one of the input values; the channels stay where they are
_IN_PLACE_OF_CHANNELS = {
    'max_pool1d',
    'max_pool2d',
    'max_pool3d',
    'adaptive_max_pool1d',
    'adaptive_max_pool2d',
    'adaptive_max_pool3d',
    'contiguous',
    'clone',
    'to',
    'float',
    'type_as',
    'detach',
    'dropout',
    'dropout_',
    'dropout2d',
    'interpolate',
    'upsample',
    'pad',
}
# several tensors become one
JOINS = {'cat', 'concat', 'concatenate', 'stack', 'hstack', 'vstack'}
_MOVEMENTS = (
    _IN_PLACE_OF_CHANNELS
    | JOINS
    | {
        'chunk',
        'split',
        'split_with_sizes',
        'tensor_split',
        'unbind',
        '__getitem__',
        'narrow',
        'select',
        'index_select',
        'reshape',
        'reshape_as',
        'view',
        'view_as',
        'flatten',
        'unflatten',
        'permute',
        'transpose',
        'swapaxes',
        'movedim',
        't',
        'squeeze',
        'unsqueeze',
        'expand',
        'expand_as',
        'broadcast_to',
        'repeat',
        'tile',
        'roll',
        'flip',
        'pixel_shuffle',
        'pixel_unshuffle',
        'channel_shuffle',
        'unfold',
        'amax',
        '__get__',
    }
)
_TRANSPOSED = {Tensor.T.__get__, Tensor.mT.__get__}
CLIPS = {
    'relu',
    'relu_',
    'relu6',
    'hardtanh',
    'hardtanh_',
    'clamp',
    'clamp_',
    'clamp_min',
    'clamp_min_',
    'clip',
    'clip_',
}
_SUMS = {'add', 'add_', '__add__', '__radd__', '__iadd__', 'sub', 'sub_', '__sub__', '__rsub__', '__isub__'}
PRODUCTS = {'mul', 'mul_', '__mul__', '__rmul__', '__imul__', 'multiply'}
# of matrices
MATRIX_PRODUCTS = frozenset({'matmul', 'bmm'})
_QUOTIENTS = {'div', 'div_', '__truediv__', '__itruediv__', 'divide', 'true_divide'}
GATES = {'sigmoid': 'sigmoid', 'sigmoid_': 'sigmoid', 'hardsigmoid': 'hardsigmoid'}
# of activations, which no weight could take over
NORMS = {'batch_norm', 'group_norm', 'instance_norm'}
GATED = {'silu': 'sigmoid', 'hardswish': 'hardsigmoid'}  # x * gate(x)
_FUNCTIONS_OF_BYTES = {*GATED, 'leaky_relu', 'leaky_relu_', 'prelu', 'tanh', 'tanh_'}
# of each value alone; runtimes compute them behind a convolution, not with it, the last in float only
FUNCTIONS = _FUNCTIONS_OF_BYTES | {'mish', 'gelu', 'elu', 'elu_', 'celu', 'celu_', 'selu', 'selu_', 'softplus'}
_ARITHMETIC = (
    CLIPS
    | _SUMS
    | PRODUCTS
    | _QUOTIENTS
    | set(GATES)
    | _FUNCTIONS_OF_BYTES
    | {
        'mean',
        'avg_pool1d',
        'avg_pool2d',
        'avg_pool3d',
        'adaptive_avg_pool1d',
        'adaptive_avg_pool2d',
        'adaptive_avg_pool3d',
        'interpolate',
        'upsample',
    }
)
# all that may have to be looked at while a quantized detector runs, and may carry a quantizer on
MOVEMENT_NAMES = frozenset(_MOVEMENTS)


def classify(func: Any, name: str, args: tuple, kwargs: dict) -> str:
    """Kind of a functional call.

    Args:
        func: The function.
        name: Its name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        :data:`MOVEMENT` (commutes with quantization: every value of the result is one of the arguments, or zero),
        :data:`ARITHMETIC` (runtimes compute it in 8 bits) or :data:`UNKNOWN`.
    """
    if name in ('interpolate', 'upsample'):
        mode = args[3] if len(args) > 3 else kwargs.get('mode', 'nearest')
        return MOVEMENT if mode.startswith('nearest') else ARITHMETIC
    if name == 'pad':
        return MOVEMENT if pads_with_zero(args, kwargs) else UNKNOWN
    if name == '__get__':
        return MOVEMENT if func in _TRANSPOSED else UNKNOWN
    if name.startswith('dropout'):
        return UNKNOWN if drops(args, kwargs) else MOVEMENT
    if name in _MOVEMENTS:
        return MOVEMENT
    return ARITHMETIC if name in _ARITHMETIC else UNKNOWN


def keeps_channels(name: str) -> bool:
    """Whether a movement leaves every channel where it is, so that a scale per channel moves along."""
    return name in _IN_PLACE_OF_CHANNELS


def is_positive(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether no value that an operation returns is below zero."""
    return name in ('softmax', *GATES) or clips_at_zero(name, args, kwargs)


def clips_at_zero(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an operation is what runtimes fuse into the one before: max(x, 0), perhaps clipped above, too."""
    if name.startswith('relu'):
        return True
    if name.startswith('clamp_min'):
        low = args[1] if len(args) > 1 else kwargs.get('min')
        return isinstance(low, int | float) and low == 0
    if name not in CLIPS:
        return False
    low, _ = clip_bounds(name, args, kwargs)
    return isinstance(low, int | float) and low == 0


def fuses_clip(name: str) -> bool:
    """Whether runtimes compute an arithmetic operation and the clip at zero behind it in one."""
    return name in _SUMS or name in PRODUCTS


def works_in_place(name: str, kwargs: dict) -> bool:
    """Whether a function overwrites its first argument."""
    if name.startswith('__'):
        return name.startswith('__i') and name not in ('__int__', '__index__', '__invert__')
    return name.endswith('_') or kwargs.get('inplace') is True


def clip_bounds(name: str, args: tuple, kwargs: dict) -> tuple[float, float]:
    """The lowest and the highest value that a clip lets through."""
    if name == 'relu6':
        return 0, 6
    default = (-1, 1) if name.startswith('hardtanh') else (None, None)
    keys = ('min_val', 'max_val') if name.startswith('hardtanh') else ('min', 'max')
    lo, hi = (args[i + 1] if len(args) > i + 1 else kwargs.get(key, default[i]) for i, key in enumerate(keys))
    return -inf if lo is None else lo, inf if hi is None else hi


def is_mean_of_images(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an operation leaves one value of each channel of an image, in its place: the mean."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return False
    if name == 'adaptive_avg_pool2d':
        size = args[1] if len(args) > 1 else kwargs.get('output_size')
        return size in (1, (1, 1), [1, 1])
    if name != 'mean':
        return False
    axes, keeps = (args[i] if len(args) > i else kwargs.get(key) for i, key in ((1, 'dim'), (2, 'keepdim')))
    return bool(keeps) and isinstance(axes, tuple | list) and sorted(axis % 4 for axis in axes) == [2, 3]


def drops(args: tuple, kwargs: dict) -> bool:
    """Whether a dropout drops anything."""
    return args[2] if len(args) > 2 else kwargs.get('training', True)


def pads_with_zero(args: tuple, kwargs: dict) -> bool:
    """Whether a padding adds nothing but zeros, or values that are there."""
    mode = args[2] if len(args) > 2 else kwargs.get('mode', 'constant')
    value = args[3] if len(args) > 3 else kwargs.get('value')
    return mode != 'constant' or not value
