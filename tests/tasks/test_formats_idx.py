"""IDX files: every array comes back as it was written, and nothing else is accepted."""

import gzip
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from tasks.errors import UserError
from tasks.formats import idx
from tests.tasks.written import IDX_CODES, idx_bytes


@given(
    array=st.sampled_from(list(IDX_CODES)).flatmap(
        lambda dtype: numpy_st.arrays(dtype, numpy_st.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    ),
    packed=st.booleans(),
)
def test_an_array_comes_back_as_it_was_written(array, packed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array"
        path.write_bytes(gzip.compress(idx_bytes(array), 1) if packed else idx_bytes(array))
        found = idx.read(path)
    assert found.dtype == array.dtype and found.dtype.isnative and found.shape == array.shape
    np.testing.assert_array_equal(found, array)


@given(content=st.binary(max_size=40), packed=st.booleans())
def test_any_other_bytes_are_a_user_error_or_an_array(content, packed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array"
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        try:
            found = idx.read(path)
        except UserError as error:
            assert str(path) in error.message and error.hint
        else:
            assert idx_bytes(found) == content


GOOD = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!DO", "begins with b'<!DO'"),
        (b"\0\0", "no IDX file"),
        (GOOD.replace(b"\x08", b"\x0a", 1), "unknown IDX type 0x0a"),
        (bytes([0, 0, 8, 0]), "0 dimensions"),
        (bytes([0, 0, 8, 200]), "200 dimensions"),
        (GOOD[:10], "within its header"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"\0", "after the 12"),
        (bytes([0, 0, 14, 4]) + b"\xff" * 16, "promises"),
        (bytes([3, 8, 0, 0]) + struct.pack("<3I", 3, 2, 2) + bytes(12), "header is little-endian"),
        (bytes([0, 0, 8, 3]) + struct.pack("<3I", 3, 2, 2) + bytes(12), "sizes look little-endian"),
    ],
    ids=["empty", "a web page", "two bytes", "type", "no dimensions", "many dimensions", "half a header", "truncated",
         "bytes after it", "overflow", "little-endian magic", "little-endian sizes"],
)  # fmt: skip
def test_a_broken_file_is_refused_by_name(tmp_path, content, reason, packed):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=reason) as caught:
        idx.read(path)
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PACKED[:-9], "truncated"),
        (PACKED[:15], "truncated"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "CRC"),
        (PACKED[:10] + b"\xff" * 4 + PACKED[14:], "cannot be read"),
        (PACKED + b"rubbish", "cannot be read"),
    ],
    ids=["no checksum", "no data", "wrong checksum", "broken data", "bytes after it"],
)
def test_a_broken_gzip_file_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        idx.read(path)


def test_a_gzip_bomb_is_left_packed(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(10, np.uint8)) + bytes(50_000_000), 9))
    with pytest.raises(UserError, match="after the 10"):
        idx.read(path)


def test_a_promise_beyond_what_gzip_can_hold_allocates_nothing(tmp_path):
    path = tmp_path / "promise.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2]) + struct.pack(">2I", 2**31, 2**31)))
    with pytest.raises(UserError, match="promises"):
        idx.read(path)


def test_an_absent_file_and_a_folder_are_user_errors(tmp_path):
    for path, reason in ((tmp_path / "none", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=reason):
            idx.read(path)
