"""Integer codes packed at their bits: 4-bit weights take half a byte each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int, lowest: int) -> Tensor:
    """Packs integer codes into bytes, ``bits`` bits each, without gaps.

    Args:
        codes: Integer codes of any shape.
        bits: Bits per code, 2 to 16.
        lowest: The lowest code of the format; codes are stored as their distance from it.

    Returns:
        uint8 tensor of shape (ceil(codes.numel() * bits / 8),), little-endian bit order.
    """
    offset = (codes.reshape(-1).cpu().to(torch.int64) - lowest).numpy()
    if offset.size and (offset.min() < 0 or offset.max() >= 1 << bits):
        raise ValueError(f'codes outside [{lowest}, {lowest + (1 << bits) - 1}] do not fit {bits} bits')
    octets = offset.astype('<u2').view(np.uint8).reshape(-1, 2)
    stream = np.unpackbits(octets, axis=1, bitorder='little')[:, :bits]
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder='little'))


def unpack_codes(packed: Tensor, bits: int, lowest: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        packed: Bytes from :func:`pack_codes`.
        bits: Bits per code.
        lowest: The lowest code of the format.
        shape: Shape of the codes.

    Returns:
        int32 codes of the given shape.
    """
    count = int(np.prod(shape))
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f'{packed.numel()} bytes do not hold {count} codes of {bits} bits')
    stream = np.unpackbits(packed.cpu().numpy(), bitorder='little')[: count * bits].reshape(count, bits)
    octets = np.packbits(np.pad(stream, ((0, 0), (0, 16 - bits))), axis=1, bitorder='little')
    codes = octets.view('<u2').reshape(-1).astype(np.int32) + lowest
    return torch.from_numpy(codes).reshape(shape)


def flatten_tensors(tensors: dict[str, Tensor]) -> dict:
    """Joins many small tensors into one per dtype; a file then spends no archive entry on each.

    Args:
        tensors: Name to tensor.

    Returns:
        ``dict(index=[[name, dtype, shape, offset, stored dtype], ...], data={dtype: flat tensor})``. A tensor of zeros
        has the offset -1 and takes no space; one of another number all over has ``-2 - offset`` and takes one element.
        Integers are stored in the smallest dtype that holds them.
    """
    index, parts, ends = [], {}, {}
    for name, tensor in tensors.items():
        dtype, flat = _dtype_name(tensor), tensor.detach().cpu().reshape(-1)
        offset, stored = -1, dtype
        if flat.count_nonzero():
            even = len(flat) > 1 and bool((flat == flat[0]).all())
            flat = _narrowed(flat[:1] if even else flat)
            stored = _dtype_name(flat)
            offset = ends.get(stored, 0)
            ends[stored] = offset + flat.numel()
            parts.setdefault(stored, []).append(flat)
            offset = -2 - offset if even else offset
        index.append([name, dtype, list(tensor.shape), offset, stored])
    return dict(index=index, data={dtype: torch.cat(flat) for dtype, flat in parts.items()})


def unflatten_tensors(flat: dict) -> dict[str, Tensor]:
    """Inverse of :func:`flatten_tensors`."""
    tensors = {}
    # schema 2 has no stored dtype: it is the tensor's own
    for name, dtype, shape, offset, *stored in flat['index']:
        own, count = getattr(torch, dtype), int(np.prod(shape))
        if offset == -1:
            tensors[name] = torch.zeros(shape, dtype=own)
            continue
        data = flat['data'][stored[0] if stored else dtype]
        if offset < -1:
            tensors[name] = torch.full(shape, data[-2 - offset].item(), dtype=own)
        else:
            tensors[name] = data[offset : offset + count].reshape(shape).to(own, copy=True)
    return tensors


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')


def _narrowed(flat: Tensor) -> Tensor:
    """Integers in the smallest dtype that holds them, anything else as it is."""
    if flat.dtype not in (torch.int16, torch.int32, torch.int64):
        return flat
    low, high = int(flat.min()), int(flat.max())
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return flat.to(dtype)
    return flat
