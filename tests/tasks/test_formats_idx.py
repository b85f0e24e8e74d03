"""IDX and .npz files: every array comes back as it was written, and nothing else is accepted."""

import gzip
import io
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from tasks.errors import UserError
from tasks.formats import idx, npz
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


# ---- .npz, the other file that these arrays come in

ARRAYS = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "labels": np.array([-1, 7], np.int64)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_named_arrays_of_an_npz_file_come_back_in_the_order_asked_for(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS, empty=np.zeros((0, 3)), turned=np.asfortranarray(ARRAYS["images"]), point=np.pi)
    names = ["labels", "images", "empty", "turned", "point"]
    labels, images, empty, turned, point = npz.read(tmp_path / "a.npz", names)
    assert labels.dtype == np.int64 and labels.tolist() == [-1, 7] and empty.shape == (0, 3) and point == np.pi
    assert np.array_equal(images, ARRAYS["images"]) and np.array_equal(turned, images)


def npz_of(content, name="images.npy", method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def npy_bytes(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


NPY = npy_bytes(ARRAYS["images"])
NPZ = npz_of(NPY)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"<!DOCTYPE html>", "cannot be read"),
        (NPZ[:-30], "cannot be read"),
        (npz_of(NPY, "others.npy"), "no array 'images'; there are others"),
        (npz_of(NPY, "images"), "no array 'images'"),
        (npz_of(NPY[:-1]), "images.npy promises 24 bytes, which it does not hold"),
        (npz_of(NPY + b"x"), "promises 24 bytes"),
        (npz_of(NPY.replace(b"(2, 3, 4)", b"(2,3,9e9)")), "cannot be read"),
        (npz_of(NPY.replace(b"(2, 3, 4)", b"(2**9,3,)")), "cannot be read"),
        (npz_of(NPY.replace(b"(2, 3, 4), }        ", b"(99999999999999, 3)}")), "promises 299999999999997 bytes"),
        (npz_of(NPY.replace(b"(2, 3, 4)", b"(-2,-3,4)")), "cannot be read"),
        (npz_of(NPY.replace(b"'|u1'", b"'|x1'")), "cannot be read"),
        (npz_of(NPY.replace(b"'descr'", b"'descr\n")), "cannot be read"),
        (npz_of(NPY[:6] + b"\x09\x00" + NPY[8:]), "unknown version"),
        (npz_of(npy_bytes(np.array([print], object))), "cannot be read: Object arrays"),
        (npz_of(NPY, method=zipfile.ZIP_LZMA), "packed by method 14"),
        (npz_of(b"P5 2 2 255"), "cannot be read"),
    ],
    ids=["empty", "a web page", "truncated", "absent", "no .npy", "a byte too few", "a byte too many", "half a size",
         "a sum", "terabytes", "negative sizes", "unknown type", "open quote", "version 9", "pickles", "LZMA", "no .npy inside"],
)  # fmt: skip
def test_a_broken_npz_file_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        npz.read(path, ["images"])
    assert str(path) in caught.value.message and caught.value.hint


def test_an_npz_file_whose_sizes_are_both_false_takes_no_memory(tmp_path):
    claimed = 2**32 - 2
    content = npz_of(NPY.replace(b"(2, 3, 4), }    ", f"({claimed - 128},), }}".encode()))  # after 128 bytes of header
    at = content.index(b"PK\1\2") + 24  # where the list at the end has the unpacked size
    (tmp_path / "a.npz").write_bytes(content[:at] + claimed.to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UserError, match="which it does not hold"):
        npz.read(tmp_path / "a.npz", ["images"])


def test_an_npz_bomb_is_left_packed(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros(100_000, np.uint8))
    with pytest.raises(UserError, match="images.npy unpacks to over 1000 bytes"):
        npz.read(tmp_path / "a.npz", ["images"], max_bytes=1000)
    with pytest.raises(UserError, match="no such file"):
        npz.read(tmp_path / "none.npz", ["images"])


@given(
    changes=st.lists(st.tuples(st.integers(0, len(NPY) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    at_header=st.booleans(),
)
def test_an_npz_file_with_any_bytes_changed_is_a_user_error_or_an_array(changes, at_header):
    content = bytearray(NPY if at_header else NPZ)
    for place, value in changes:
        content[place % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(npz_of(bytes(content)) if at_header else content)
        try:
            [found] = npz.read(path, ["images"])
        except UserError as error:
            assert str(path) in error.message
        else:
            assert isinstance(found, np.ndarray) and found.nbytes <= 24
