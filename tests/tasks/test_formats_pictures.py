"""Picture files of every kind and in every state: kept, written anew, or one broken row; and what is kept can be decoded."""

import io
import math
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from tasks.errors import BadRow
from tasks.fields import ClassMap, Picture
from tasks.formats import pictures

HEIGHT, WIDTH = 44, 61
CLOSE = 3.0  # of 255, on average: two decoders of JPEG round in their own ways


def pixels(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Soft waves, brighter towards the right end below: nothing in them is the same when it is turned or mirrored."""
    y, x = np.mgrid[:height, :width]
    waves = [60 + 50 * np.sin((x * a + y * b) / 9) for a, b in ((1, 2), (2, 1), (1, -1))]
    return (np.stack(waves, 2) + (x / width * 90 + y / height * 45)[:, :, None]).clip(0, 255).astype(np.uint8)


def written(image: Pillow.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTO = Pillow.fromarray(pixels())
JPEG = written(PHOTO, "JPEG", quality=90)
PNG = written(PHOTO, "PNG")


def seen_by_pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Pillow.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert(mode))


def chunk(kind: bytes, content: bytes) -> bytes:
    """One part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, compressed: bytes, *others: bytes) -> bytes:
    """A grey PNG of 8 bits, whatever its content really holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *others, chunk(b"IDAT", compressed), chunk(b"IEND", b"")])


def with_profile(png: bytes, profile: bytes) -> bytes:
    """A PNG with this as its colour profile, behind its header."""
    return png[:33] + chunk(b"iCCP", b"profile\0\0" + profile) + png[33:]


def sampled(jpeg: bytes, *factors: int) -> bytes:
    """A JPEG whose header claims these samplings of luminance and colours: 0x21 is 2 across, 1 down."""
    at = jpeg.index(b"\xff\xc0") + 11
    changed = bytearray(jpeg)
    changed[at : at + 9 : 3] = bytes(factors)
    return bytes(changed)


# ---- what is kept as it is


KEPT = {
    "a JPEG": JPEG,
    "a PNG": PNG,
    "a progressive JPEG": written(PHOTO, "JPEG", progressive=True),
    "a JPEG of full colour resolution": written(PHOTO, "JPEG", subsampling=0),
    "a JPEG that holds red, green and blue": written(PHOTO, "JPEG", keep_rgb=True),
    "a grey JPEG": written(PHOTO.convert("L"), "JPEG"),
    "a JPEG with bytes behind its end": JPEG + b"\0trailing" * 50,
    "a JPEG with others behind it, as telephones write it": written(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    "a JPEG with a corrupt colour profile": written(PHOTO, "JPEG", icc_profile=b"no profile"),
    "a PNG whose colour profile cannot be unpacked": with_profile(PNG, b"not zlib"),
    "a PNG whose colour profile is none": with_profile(PNG, zlib.compress(b"no profile")),
    "an animated PNG": written(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
    "a PNG with bytes behind its end": PNG + b"trailing" * 50,
    "a JPEG of 2 x 2": written(PHOTO.resize((2, 2)), "JPEG"),
    "a PNG of 2 x 2": written(PHOTO.resize((2, 2)), "PNG"),
    "a PNG of 2 x 3000": written(PHOTO.resize((3000, 2)), "PNG"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_training_can_decode_keeps_its_bytes(name):
    kept = pictures.normalised(KEPT[name], 3)
    assert kept["bytes"] == KEPT[name]
    seen, expected = pictures.decode(kept["bytes"], 3), seen_by_pillow(KEPT[name])
    assert seen.shape == expected.shape == (kept["height"], kept["width"], 3)
    assert np.abs(seen.astype(int) - expected).mean() < (CLOSE if "JPEG" in name else 1e-9)


# ---- what is written anew


LETTER = np.zeros((9, 14, 4), np.uint8)  # half of it transparent
LETTER[:, 7:] = (200, 30, 90, 255)
ON_WHITE = np.full((9, 14, 3), 255, np.uint8)
ON_WHITE[:, 7:] = (200, 30, 90)
DEEP = (np.arange(30 * 40, dtype=np.uint16) * 54).reshape(30, 40)  # 16 bits a pixel
PALETTE = Pillow.fromarray(np.repeat([[0, 1, 2]], 6, 0).astype(np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
PALETTE_ON_WHITE = np.repeat([[[255, 255, 255], [0, 255, 0], [127, 127, 255]]], 6, 0)
ANIMATION = [Pillow.fromarray(np.full((8, 9, 3), shade, np.uint8)) for shade in (10, 200, 250)]
RGB48 = png_of(2, 2, b"").replace(  # red 0x80 0x01, green 0x00 0xff, blue 0xff 0x00, four times
    chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)),
    chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)),
).replace(chunk(b"IDAT", b""), chunk(b"IDAT", zlib.compress((b"\0" + b"\x80\x01\x00\xff\xff\x00" * 2) * 2)))  # fmt: skip

ANEW = {
    "transparent": (written(Pillow.fromarray(LETTER), "PNG"), ON_WHITE),
    "one colour transparent": (written(Pillow.fromarray(ON_WHITE), "PNG", transparency=(200, 30, 90)),
                               np.full((9, 14, 3), 255)),
    "grey and transparent": (written(Pillow.fromarray(LETTER).convert("LA"), "PNG"),
                             np.asarray(Pillow.fromarray(ON_WHITE).convert("L").convert("RGB"))),
    "a palette with transparent colours": (written(PALETTE, "PNG", transparency=b"\x00\xff\x80"), PALETTE_ON_WHITE),
    "a palette": (written(PHOTO.quantize(16), "PNG"), np.asarray(PHOTO.quantize(16).convert("RGB"))),
    "black and white": (written(PHOTO.convert("1"), "PNG"), np.asarray(PHOTO.convert("1").convert("RGB"))),
    "grey": (written(PHOTO.convert("L"), "PNG"), np.asarray(PHOTO.convert("L").convert("RGB"))),
    "grey of 16 bits": (written(Pillow.fromarray(DEEP), "PNG"), np.repeat((DEEP >> 8)[:, :, None], 3, 2)),
    "grey of 16 bits as TIFF": (written(Pillow.fromarray(DEEP), "TIFF"), np.repeat((DEEP >> 8)[:, :, None], 3, 2)),
    "animated": (written(ANIMATION[0], "GIF", save_all=True, append_images=ANIMATION[1:]), np.full((8, 9, 3), 10)),
    "WebP": (written(PHOTO, "WEBP", lossless=True), pixels()),
    "animated WebP": (written(ANIMATION[0], "WEBP", save_all=True, append_images=ANIMATION[1:], lossless=True),
                      np.full((8, 9, 3), 10)),
    "TIFF": (written(PHOTO, "TIFF", compression="tiff_lzw"), pixels()),
    "TIFF of four colours": (written(PHOTO.convert("CMYK"), "TIFF"), pixels()),
    "BMP": (written(PHOTO, "BMP"), pixels()),
    "PPM": (written(PHOTO, "PPM"), pixels()),
}  # fmt: skip


@pytest.mark.parametrize("name", ANEW)
def test_what_training_cannot_decode_is_written_anew_as_a_plain_png_of_the_same_pixels(name):
    data, expected = ANEW[name]
    kept = pictures.normalised(data, 3)
    assert kept["bytes"] != data and kept["bytes"].startswith(b"\x89PNG")
    assert np.array_equal(pictures.decode(kept["bytes"], 3), expected)
    assert pictures.normalised(kept["bytes"], 3) == kept, "once is enough"


def test_a_png_of_16_bits_a_colour_is_decoded_in_8():
    kept = pictures.normalised(RGB48, 3)
    assert pictures.decode(kept["bytes"], 3).tolist() == [[[128, 0, 255]] * 2] * 2


FOUR_COLOURS = written(PHOTO.convert("CMYK"), "JPEG", quality=95)
RARE_JPEGS = {
    "four colours": FOUR_COLOURS,
    "colours sampled more finely than light": sampled(JPEG, 0x11, 0x22, 0x22),
    "colours sampled at a third": sampled(JPEG, 0x31, 0x11, 0x11),
    "colours sampled unlike one another": sampled(JPEG, 0x22, 0x21, 0x12),
    "one colour sampled like light": sampled(JPEG, 0x22, 0x11, 0x22),
}


@pytest.mark.parametrize("name", RARE_JPEGS)
def test_a_jpeg_that_only_pillow_can_decode_is_written_anew_as_a_jpeg(name):
    """libjpeg-turbo's simple interface, which training decodes with, refuses them: that would be in mid-training."""
    data = RARE_JPEGS[name]
    kept = pictures.normalised(data, 3)
    assert kept["bytes"] != data and kept["bytes"].startswith(b"\xff\xd8")
    assert np.abs(pictures.decode(kept["bytes"], 3).astype(int) - seen_by_pillow(data)).mean() < CLOSE


def test_four_colours_are_those_of_adobe():
    assert b"Adobe" in FOUR_COLOURS
    kept = pictures.normalised(FOUR_COLOURS, 3)
    assert np.abs(pictures.decode(kept["bytes"], 3).astype(int) - pixels()).mean() < CLOSE


TURNED = {  # EXIF orientation -> what the camera stored of an upright picture
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, 1), 7: lambda p: np.rot90(p.transpose(1, 0, 2), 2),
    8: lambda p: np.rot90(p, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_that_its_camera_turned_is_upright(kind, orientation):
    exif = Pillow.Exif()
    exif[pictures.ORIENTATION] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    stored = Pillow.fromarray(np.ascontiguousarray(TURNED[orientation](pixels())))
    data = written(stored, kind, exif=exif, **lossless)
    kept = pictures.normalised(data, 3)
    seen = pictures.decode(kept["bytes"], 3)
    assert seen.shape == (HEIGHT, WIDTH, 3) == (kept["height"], kept["width"], 3)
    assert np.abs(seen.astype(int) - pixels()).mean() < (CLOSE if kind == "JPEG" else 1e-9)
    assert (kept["bytes"] == data) == (orientation == 1 and kind in ("JPEG", "PNG"))


def test_a_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "really.gif"
    path.write_bytes(JPEG)
    assert pictures.normalised(path, 3)["bytes"] == JPEG
    assert pictures.read(path, 3, HEIGHT, WIDTH).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("data", [JPEG, PNG, *(data for data, _ in ANEW.values())])
def test_one_channel_is_grey(data):
    kept = pictures.normalised(data, 1)
    seen = pictures.decode(kept["bytes"], 1)
    assert seen.shape == (kept["height"], kept["width"], 1)
    colours = pictures.decode(pictures.normalised(data, 3)["bytes"], 3)
    grey = np.asarray(Pillow.fromarray(colours).convert("L"))
    assert np.abs(seen[:, :, 0].astype(int) - grey).mean() < CLOSE


# ---- what is one broken row


ZEROS = zlib.compress(bytes(10_000_000))
BROKEN = {
    "nothing": (b"", "is empty"),
    "no picture": (b"<!DOCTYPE html><html>404</html>", "is no picture that can be read"),
    "a format that is not allowed": (written(PHOTO, "ICO"), "is no picture that can be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture that can be read"),
    "a JPEG without its end": (JPEG[: len(JPEG) // 2], "truncated"),
    "a JPEG of its start alone": (JPEG[:20], "is no picture that can be read"),
    "a PNG without its end": (PNG[: len(PNG) // 2], "is no picture that can be read"),
    "a PNG of its header alone": (PNG[:33], "is no picture that can be read"),
    "a PNG with another checksum": (PNG[:29] + b"\0\0\0\0" + PNG[33:], "is no picture that can be read"),
    "a GIF without its end": (written(PHOTO, "GIF")[:900], "is no picture that can be read"),
    "a WebP without its end": (written(PHOTO, "WEBP")[:200], "is no picture that can be read"),
    "a TIFF without its end": (written(PHOTO, "TIFF")[:99], "is no picture that can be read"),
    "a bomb of a header": (png_of(65_500, 65_500, b""), "has too many pixels"),
    "a bomb that is packed well": (png_of(65_500, 65_500, ZEROS), "has too many pixels"),
    "a bomb below Pillow's own bound": (png_of(10_000, 10_000, ZEROS), "has 10000 x 10000 pixels, at most 50000000"),
    "a profile that is a bomb": (png_of(9, 9, zlib.compress(bytes(90)), chunk(b"zTXt", b"k\0\0" + ZEROS)), "too large"),
    "1 x 1": (written(PHOTO.resize((1, 1)), "PNG"), "has 1 x 1 pixels"),
    "1 pixel high": (written(PHOTO.resize((9, 1)), "JPEG"), "has 9 x 1 pixels"),
    "a JPEG of 12 bits": (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "is no picture"),
    "a number": (7, "expected the bytes of a picture, its path or an array, got int"),
    "a path that is none": ("a\0b", "there is no such file"),
    "floats": (pixels() / 255, "expected uint8"),
    "four channels": (LETTER, "expected uint8"),
    "an array of a bomb": (np.zeros((5_001, 10_000), np.uint8), "at most 50000000"),
    "an empty array": (np.zeros((0, 5, 3), np.uint8), "has 5 x 0 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_is_a_broken_row(name):
    value, words = BROKEN[name]
    with pytest.raises(BadRow, match=words):
        pictures.normalised(value, 3)


@pytest.mark.parametrize("name", [name for name, (value, _) in BROKEN.items() if isinstance(value, bytes)])
def test_it_is_so_too_where_pictures_are_read_at_one_size_or_as_classes(tmp_path, name):
    path = tmp_path / "picture.png"
    path.write_bytes(BROKEN[name][0])
    with pytest.raises(BadRow):
        pictures.read(path, 3, 8, 8)
    with pytest.raises(BadRow):
        pictures.class_map(path)


def test_what_is_no_file_is_a_broken_row_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "pipe"):
        with pytest.raises(BadRow, match="there is no such file"):
            pictures.normalised(path, 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_broken_row(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(BadRow, match="cannot be read: Permission denied"):
        pictures.normalised(path, 3)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"bytes": PNG}, "expected the bytes of a picture, got a dict of bytes"),
        ({"bytes": PNG, "height": 5, "width": 5}, f"has {HEIGHT} x {WIDTH} pixels instead of 5 x 5"),
        ({"bytes": b"", "height": 5, "width": 5}, "is no picture"),
        ({"bytes": written(PHOTO, "BMP"), "height": HEIGHT, "width": WIDTH}, "is a BMP of mode RGB"),
        ({"bytes": written(PHOTO.convert("L"), "PNG"), "height": HEIGHT, "width": WIDTH}, "is a PNG of mode L"),
        ({"bytes": FOUR_COLOURS, "height": HEIGHT, "width": WIDTH}, "is a JPEG of mode CMYK"),
    ],
    ids=["not all", "another size", "nothing", "another format", "other channels", "four colours"],
)
def test_a_row_that_gives_what_stores_keep_is_held_to_it(value, words):
    with pytest.raises(BadRow, match=words):
        Picture().check(value, {})


# ---- maps of classes


def test_a_class_map_keeps_numbers_and_no_colours():
    numbers = np.array([[0, 1, 2], [255, 7, 7]], np.uint8)
    palette = Pillow.fromarray(numbers, "P")
    palette.putpalette(bytes(range(256)) * 3)
    see_through = written(palette, "PNG", transparency=0)
    for value in (
        numbers,
        written(palette, "PNG"),
        see_through,
        written(Pillow.fromarray(numbers), "PNG", transparency=7),
    ):
        kept = ClassMap().check(pictures.class_map(value), {})
        assert np.array_equal(pictures.decode(kept["bytes"], 1)[:, :, 0], numbers)
    bits = written(Pillow.fromarray(numbers > 1), "PNG")
    assert np.array_equal(pictures.decode(pictures.class_map(bits)["bytes"], 1)[:, :, 0], numbers > 1)


@pytest.mark.parametrize("value", [PNG, JPEG, written(PHOTO.convert("L"), "JPEG"), pixels(), np.array([[0, 256]]),
                                   np.array([[-1, 0]]), np.array([[0.5, 1]]), written(Pillow.fromarray(DEEP), "PNG")])  # fmt: skip
def test_what_holds_no_numbers_of_classes_is_refused(value):
    with pytest.raises(BadRow, match=r"classes"):
        pictures.class_map(value)


# ---- decoding for training


@pytest.mark.parametrize("shrunk", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (64, 96), (2, 2), (9, 333)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(size, shrunk, options):
    data = written(Pillow.fromarray(pixels(*size)), "JPEG", **options)
    for channels in (1, 3):
        seen = pictures.decode(data, channels, shrunk)
        assert seen.shape == (math.ceil(size[0] / shrunk), math.ceil(size[1] / shrunk), channels)
    if min(size) >= 8 * shrunk:
        mean = np.asarray(Pillow.fromarray(seen).resize((1, 1), Pillow.Resampling.BOX)).ravel()
        assert np.abs(mean - pixels(*size).mean((0, 1))).max() < 6, "it shows the same"


def test_a_png_is_decoded_as_large_as_it_is():
    assert np.array_equal(pictures.decode(PNG, 3, 8), pixels())


# ---- mutated files


EXIF = Pillow.Exif()
EXIF[pictures.ORIENTATION], EXIF[0x010E] = 1, "told about it"
SEEDS = {
    "JPEG": written(PHOTO, "JPEG", quality=90, exif=EXIF, icc_profile=bytes(40)),
    "progressive": written(PHOTO, "JPEG", progressive=True),
    "PNG": written(PHOTO, "PNG", exif=EXIF),
    "palette": written(PHOTO.quantize(16), "PNG", transparency=3),
}


@settings(max_examples=300, deadline=10_000)
@given(st.data(), st.sampled_from(sorted(SEEDS)), st.sampled_from([1, 3]))
def test_a_mutated_file_is_a_broken_row_or_a_picture_that_training_can_decode(data, name, channels):
    mutated = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(1, 6), "flips")):
        # Half of the flips in the first bytes: there stand the headers.
        last = data.draw(st.sampled_from([120, len(mutated)])) - 1
        mutated[data.draw(st.integers(0, last), "place")] ^= data.draw(st.integers(1, 255), "bits")
    if name in ("PNG", "palette") and data.draw(st.booleans(), "repaired"):
        repaired_png(mutated)
    try:
        kept = pictures.normalised(bytes(mutated), channels)
    except BadRow:
        return
    pictures.looked_at(kept, channels)
    for shrunk in (1, 2, 4, 8):
        seen = pictures.decode(kept["bytes"], channels, shrunk)
        smaller = shrunk if kept["bytes"].startswith(b"\xff\xd8") else 1
        assert seen.shape == (math.ceil(kept["height"] / smaller), math.ceil(kept["width"] / smaller), channels)


def repaired_png(data: bytearray) -> None:
    """Makes the checksums of a PNG right again, as far as its parts can be followed: else they hide every other fault."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(bytes(data[at + 4 : end])))
        at = end + 4
