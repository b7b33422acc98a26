"""The integer checkpoint: packed codes, scales, zero points and tables; the simulated model is rebuilt from it."""

from __future__ import annotations

import io
import os
import sys
import zlib
from collections.abc import Mapping
from types import FunctionType

import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.checkpoint.check import CHECKSUM, check_packed, check_state, checksum
from mmdet_ptq.deploy.checkpoint.packing import flatten_tensors, pack_codes, unflatten_tensors, unpack_codes
from mmdet_ptq.deploy.checkpoint.text import pack_state, unpack_state
from mmdet_ptq.deploy.integers.biases import round_shared_biases
from mmdet_ptq.deploy.integers.weights import integer_weight
from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import Malformed, plain, qualified
from mmdet_ptq.files import load_tensors, save_tensors
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer, Quantizer
from mmdet_ptq.version import __version__
from mmdet_ptq.wrapping import QuantizedWeight, Structure, apply_structure, float_weight, quantized_weights

FORMAT = 'mmdet_ptq.quantized'
SCHEMA = 3
# the oldest that is read; 2 stores its text as it is
OLDEST = 2
TABLE_SCALE = ':scale'


def is_quantized_checkpoint(checkpoint: object) -> bool:
    """Whether a loaded checkpoint is one of ours."""
    return isinstance(checkpoint, Mapping) and checkpoint.get('format') == FORMAT


def quantized_state(
    detector: nn.Module,
    structure: Structure,
    config: dict,
    dataset_meta: dict | None,
    input_shape: tuple[int, ...] = (),
    padded: bool = False,
) -> dict:
    """Collects the integer checkpoint of a calibrated detector.

    Args:
        detector: The quantized detector.
        structure: Its structure.
        config: The config as a plain dict; the float detector is built from it. Kept as data, not as text, so
            that loading runs no code.
        dataset_meta: Class names and palette, as mmdet keeps them.
        input_shape: Shape of one image as the test pipeline gives it, (1, C, H, W): exported models take it.
            Defaults to (): not known.
        padded: Whether smaller images are to be padded to that size. Defaults to False.

    Returns:
        Plain containers of tensors, numbers and strings.
    """
    weights = quantized_weights(detector)
    packed, layers, tables = {}, {}, {}
    for name, quantized in weights.items():
        weight = float_weight(detector.get_submodule(name))
        low, high = quantized.quantizer.code_range
        codes = quantized.codes(weight)
        bits = max(1, (high - low).bit_length())
        packed[name] = pack_codes(codes, bits, low)
        layers[name] = dict(bits=bits, lowest=low, rows=list(codes.shape), shape=list(weight.shape))
        if isinstance(quantized.quantizer, LogAffineQuantizer):
            levels, tables[f'{name}{TABLE_SCALE}'] = quantized.quantizer.integer_levels()
            tables[name] = levels.to(torch.int8)
    coded = _float_weights(detector)
    floats = {key: value for key, value in _own_tensors(detector).items() if id(value) not in coded}
    for name, module in detector.named_modules():
        if isinstance(module, AffineQuantizer):
            # training may have left one outside its bounds, where it counts as the bound
            floats[f'{name}.scale'] = module.positive_scale().detach()
    return plain(
        dict(
            format=FORMAT,
            schema=SCHEMA,
            version=__version__,
            config=config,
            dataset_meta=dataset_meta or {},
            input_shape=list(input_shape),
            padded=padded,
            structure=structure.to_dict(),
            layers=layers,
            codes=flatten_tensors(packed),
            tables=flatten_tensors(tables),
            tensors=flatten_tensors(floats),
        ),
        _stored,
        tuple,
    )


def save_quantized(path: str | os.PathLike, state: dict) -> None:
    """Writes the integer checkpoint, atomically."""
    save_tensors(path, _sealed(state))


def stored_bytes(state: dict) -> int:
    """Size of the file that :func:`save_quantized` would write."""
    buffer = io.BytesIO()
    torch.save(_sealed(state), buffer)
    return buffer.tell()


def _sealed(state: dict) -> dict:
    packed = pack_state(state)
    return {**packed, CHECKSUM: checksum(packed)}


def read_quantized(path: str | os.PathLike) -> dict:
    """Reads an integer checkpoint.

    Raises:
        PTQError: The file is missing, damaged, or no integer checkpoint of a known schema.
    """
    state = load_tensors(path)
    if not is_quantized_checkpoint(state):
        raise PTQError(f'{str(path)!r} is no quantized checkpoint; make one with tools/ptq.py.')
    damaged = f'{str(path)!r} is damaged; run tools/ptq.py again'
    for key, kind in (('schema', int), ('version', str)):
        if not isinstance(state.get(key), kind):
            raise PTQError(f'{damaged}: the field `{key}` is missing or of another kind.')
    if state['schema'] > SCHEMA:
        raise PTQError(f'{str(path)!r} was written by a newer mmdet-ptq ({state["version"]:.20}); upgrade mmdet-ptq.')
    if state['schema'] < OLDEST:
        raise PTQError(
            f'{str(path)!r} was written by mmdet-ptq {state["version"]:.20}, whose weights are decoded in '
            'another way; run tools/ptq.py again.'
        )
    try:
        if state['schema'] == SCHEMA:
            check_packed(state)
            state = unpack_state(state)
        check_state(state)
    except (Malformed, PTQError) as error:
        # the sentence about the structure says again what to do
        cause = error.__cause__ if isinstance(error.__cause__, Malformed) else error
        raise PTQError(f'{damaged}: {cause}.') from error
    except (ValueError, zlib.error) as error:
        raise PTQError(f'{damaged}: its text cannot be read.') from error
    return state


def load_quantized_state(detector: nn.Module, state: dict) -> Structure:
    """Turns a float detector of the same architecture into the calibrated quantized one, in place.

    The float weights become the values of the codes, and the quantized weights are frozen to exactly these; call
    :func:`mmdet_ptq.wrapping.thaw_weights` to train the detector further. Convolutions that several levels share add
    their bias as integer kernels do, see :func:`mmdet_ptq.deploy.integers.biases.round_shared_biases`.

    Args:
        detector: A float detector of the checkpoint's config; its weights do not matter.
        state: What :func:`read_quantized` returned.

    Returns:
        The detector's structure.

    Raises:
        PTQError: The detector is of another architecture.
    """
    structure = Structure.from_dict(state['structure'])
    try:
        apply_structure(detector, structure)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # names and formats that this detector's layers do not take
        raise PTQError(
            f'the quantized checkpoint does not fit the detector ({type(error).__name__}: {error}); use the config it '
            'was made with, or run tools/ptq.py again.'
        ) from error
    weights, coded = quantized_weights(detector), _float_weights(detector)
    stored = {name for name, value in _own_tensors(detector).items() if id(value) not in coded}
    try:
        result = detector.load_state_dict(unflatten_tensors(state['tensors']), strict=False)
    except RuntimeError as error:
        raise PTQError(
            f'the quantized checkpoint belongs to another architecture: {str(error).splitlines()[-1].strip()}'
        ) from error
    wrong = [key for key in result.missing_keys if key in stored] + list(result.unexpected_keys)
    if wrong:
        raise PTQError(
            f'the quantized checkpoint does not fit the detector ({len(wrong)} tensors, first {wrong[0]}); '
            'use the config it was made with.'
        )
    packed, tables = unflatten_tensors(state['codes']), unflatten_tensors(state['tables'])
    with torch.no_grad():
        for name, quantized in weights.items():
            entry = state['layers'][name]
            codes = unpack_codes(packed[name], entry['bits'], entry['lowest'], tuple(entry['rows']))
            weight = float_weight(detector.get_submodule(name))
            _check_codes(name, codes, quantized, entry, weight)
            _check_table(name, quantized.quantizer, tables, len(codes))
            values = integer_weight(
                quantized.quantizer, codes, tables.get(name), tables.get(f'{name}{TABLE_SCALE}')
            ).values()
            weight.copy_(quantized.layout.from_rows(values, torch.Size(entry['shape'])))
            quantized.fix(weight)
    _check_zero_points(detector)
    round_shared_biases(detector, structure)
    return structure


def _check_codes(name: str, codes: Tensor, quantized: QuantizedWeight, entry: dict, weight: Tensor) -> None:
    low, high = quantized.quantizer.code_range
    if (entry['lowest'], entry['bits']) != (low, max(1, (high - low).bit_length())) or codes.max() > high:
        raise PTQError(
            f'the codes of {name} are not those of its format ({low} to {high}); the checkpoint is damaged, run '
            'tools/ptq.py again.'
        )
    if list(weight.shape) != entry['shape'] or quantized.layout.to_rows(weight).shape != codes.shape:
        raise PTQError(
            f'the quantized checkpoint does not fit the detector ({name} is {tuple(weight.shape)}, not '
            f'{tuple(entry["shape"])}); use the config it was made with.'
        )


def _check_table(name: str, quantizer: Quantizer, tables: dict[str, Tensor], rows: int) -> None:
    if not isinstance(quantizer, LogAffineQuantizer):
        return
    levels, scale = tables.get(name), tables.get(f'{name}{TABLE_SCALE}')
    wanted = 2**quantizer.bits
    fits = (
        levels is not None
        and scale is not None
        and levels.dim() == 2
        and levels.shape[1] == wanted
        and {len(levels), *scale.shape} <= {1, rows}
        and scale.dim() == 1
        and int(levels.abs().max()) <= quantizer.table_max
        and bool((torch.isfinite(scale) & (scale >= 0)).all())
    )
    if not fits:
        raise PTQError(
            f'the table of {name} does not have {wanted} levels within {quantizer.table_max} and a scale; the '
            'checkpoint is damaged, run tools/ptq.py again.'
        )


def _check_zero_points(detector: nn.Module) -> None:
    for name, module in detector.named_modules():
        if isinstance(module, AffineQuantizer):
            low, high = module.code_range
            if module.zero_point.min() < low - 1 or module.zero_point.max() > high:
                raise PTQError(
                    f'a zero point of {name} is not within its codes ({low} to {high}); the checkpoint is damaged, run '
                    'tools/ptq.py again.'
                )


def _own_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """The detector's state, each tensor once: a module in several places has several names."""
    seen, own = set(), {}
    for name, value in detector.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            own[name] = value
    return own


def _float_weights(detector: nn.Module) -> set[int]:
    """Identities of the float weights that integer codes stand for."""
    return {id(float_weight(detector.get_submodule(name))) for name in quantized_weights(detector)}


def _stored(value: object) -> object:
    """A value as files hold it; equal strings are one object.

    Pickle writes an object once; the size of a checkpoint must not depend on where a string came from.
    """
    if isinstance(value, set):
        return plain(list(value), _stored, tuple)
    if isinstance(value, (int, float, bool, Tensor)) or value is None:
        return value
    return sys.intern(qualified(value) if isinstance(value, type | FunctionType) else str(value))
