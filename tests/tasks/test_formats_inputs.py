"""What is to be predicted: pictures in any common shape, lines of text, rows of numbers."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from tasks.errors import UserError
from tasks.fields import Boxes, Image, Text, Tokens, Vector
from tasks.formats import inputs, pictures

GREY = {"image": Image(1, 4, 6)}
COLOUR = {"image": Image(3, 4, 6)}
RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def picture_in(folder, name, array, mode=None, **options):
    path = folder / name
    image = Pillow.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_a_picture_of_the_right_size_keeps_its_pixels(tmp_path):
    [row] = inputs.read(picture_in(tmp_path, "a.png", RAMP), GREY)
    assert row["image"].dtype == np.uint8 and np.array_equal(row["image"], RAMP[None])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("fields", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_kind_of_colour_becomes_the_field_s(tmp_path, mode, fields):
    path = picture_in(tmp_path, "a.tif", np.full((8, 12), 255, np.uint8), mode)
    [row] = inputs.read(path, fields)
    assert row["image"].shape == fields["image"].shape and (row["image"] >= 254).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    path = picture_in(tmp_path, "a.png", RAMP.astype(np.uint16) * 257)
    [row] = inputs.read(path, GREY)
    assert np.array_equal(row["image"], RAMP[None])


def test_transparency_lies_on_white(tmp_path):
    path = picture_in(tmp_path, "a.png", np.zeros((4, 6, 4), np.uint8))
    [row] = inputs.read(path, COLOUR)
    assert (row["image"] == 255).all()


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = picture_in(tmp_path, "a.png", np.rot90(RAMP).copy(), exif=exif)
    [row] = inputs.read(path, GREY)
    assert np.array_equal(row["image"], RAMP[None])


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Pillow.new("L", (6, 4), shade) for shade in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    [row] = inputs.read(tmp_path / "a.gif", GREY)
    assert (row["image"] == 255).all()


def test_the_format_is_seen_from_the_content_and_not_from_the_name(tmp_path):
    picture_in(tmp_path, "a.png", RAMP)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    [row] = inputs.read(tmp_path / "a.jpg", GREY)
    assert np.array_equal(row["image"], RAMP[None])


def test_a_folder_gives_its_pictures_in_the_order_of_their_names(tmp_path):
    for shade, name in ((20, "b.png"), (10, "a.png"), (30, "c.png")):
        picture_in(tmp_path, name, np.full((4, 6), shade, np.uint8))
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "deeper").mkdir()
    assert [row["image"].max() for row in inputs.read(tmp_path, GREY)] == [10, 20, 30]


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no picture"),
        (b"<!DOCTYPE html>", "no picture"),
        (jpeg()[:-600], "no picture"),
        (png_that_claims(65_500, 65_500), "too many pixels"),
        (png_that_claims(9_000, 9_000), "9000 x 9000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n", "no picture"),
    ],
    ids=["empty", "a web page", "truncated", "bomb", "large", "a format that is not on the list"],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        list(inputs.read(path, GREY))
    assert str(path) in caught.value.message


def test_only_grey_and_colour_pictures_can_be_read(tmp_path):
    with pytest.raises(UserError, match="1 or 3 channels"):
        list(inputs.read(picture_in(tmp_path, "a.png", RAMP), {"image": Image(4, 4, 6)}))


def test_every_suffix_belongs_to_a_format_of_the_list():
    Pillow.init()
    assert {Pillow.registered_extensions()[suffix] for suffix in pictures.SUFFIXES} == set(pictures.FORMATS)


@pytest.mark.parametrize("field", [Text(), Tokens()], ids=["text", "tokens"])
def test_text_is_read_line_by_line(tmp_path, field):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff 好 \r\n\n不好".encode())
    assert list(inputs.read(path, {"words": field})) == [{"words": "好"}, {"words": "不好"}]


@pytest.mark.parametrize("names", ["", "a,b\n"], ids=["without names", "with names"])
def test_vectors_are_the_lines_of_a_table(tmp_path, names):
    path = tmp_path / "a.csv"
    path.write_text(f"{names}1,2\n3,4.5\n")
    assert [row["x"] for row in inputs.read(path, {"x": Vector(2)})] == [[1, 2], [3, 4.5]]


@pytest.mark.parametrize(
    ("content", "fields", "reason"),
    [
        ("1,2,3\n", {"x": Vector(2)}, "line 1: expected 2 numbers, got 3"),
        ("1,2\n3,\n", {"x": Vector(2)}, "line 2, column 2: the number is missing"),
        ("1,2\n3,x\n", {"x": Vector(2)}, "line 2, column 2: expected a number"),
        ("\n \n", {"x": Text()}, "holds no text"),
        ("1\n", {"x": Text(), "y": Vector(1)}, "how a file holds x and y"),
        ("1\n", {"x": Boxes(target=False)}, "how a file holds x"),
        ("1\n", {}, "how a file holds no input"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, fields, reason):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        list(inputs.read(path, fields))
    assert str(path) in caught.value.message and caught.value.hint


def test_nothing_to_predict_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        inputs.read(tmp_path / "none.png", GREY)
    with pytest.raises(UserError, match="holds no pictures"):
        list(inputs.read(tmp_path, GREY))
