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
    stream = np.unpackbits(packed.cpu().numpy(), bitorder='little')[:count * bits].reshape(count, bits)
    octets = np.packbits(np.pad(stream, ((0, 0), (0, 16 - bits))), axis=1, bitorder='little')
    codes = octets.view('<u2').reshape(-1).astype(np.int32) + lowest
    return torch.from_numpy(codes).reshape(shape)


def flatten_tensors(tensors: dict[str, Tensor]) -> dict:
    """Joins many small tensors into one per dtype; a file then spends no archive entry on each.

    Args:
        tensors: Name to tensor.

    Returns:
        ``dict(index=[[name, dtype, shape, offset], ...], data={dtype: flat tensor})``; a tensor of zeros has the
        offset -1 and takes no space.
    """
    index, parts, ends = [], {}, {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix('torch.')
        offset = -1
        if tensor.count_nonzero():
            offset = ends.get(dtype, 0)
            ends[dtype] = offset + tensor.numel()
            parts.setdefault(dtype, []).append(tensor.detach().cpu().reshape(-1))
        index.append([name, dtype, list(tensor.shape), offset])
    return dict(index=index, data={dtype: torch.cat(flat) for dtype, flat in parts.items()})


def unflatten_tensors(flat: dict) -> dict[str, Tensor]:
    """Inverse of :func:`flatten_tensors`."""
    tensors = {}
    for name, dtype, shape, offset in flat['index']:
        count = int(np.prod(shape))
        if offset < 0:
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
        else:
            tensors[name] = flat['data'][dtype][offset:offset + count].reshape(shape).clone()
    return tensors
