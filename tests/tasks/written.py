"""Raw files as tests write them."""

import struct

import numpy as np

from tasks.formats import idx

IDX_CODES = {np.dtype(dtype).newbyteorder("="): code for code, dtype in idx.TYPES.items()}


def idx_bytes(array: np.ndarray) -> bytes:
    """Returns an array as an IDX file."""
    header = bytes([0, 0, IDX_CODES[array.dtype], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()
