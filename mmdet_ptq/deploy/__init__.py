"""Integers out."""
from .checkpoint import (
    is_quantized_checkpoint,
    load_quantized_state,
    quantized_state,
    read_quantized,
    save_quantized,
    stored_bytes,
)
from .packing import pack_codes, unpack_codes

__all__ = ['is_quantized_checkpoint', 'load_quantized_state', 'pack_codes', 'quantized_state', 'read_quantized',
           'save_quantized', 'stored_bytes', 'unpack_codes']
