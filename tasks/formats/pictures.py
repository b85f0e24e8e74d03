"""Pictures in the usual file formats: made into arrays of one size, or into the JPEG and PNG that stores keep."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.errors import BadRow

if TYPE_CHECKING:
    from PIL import Image as Pillow

# An allow-list: Pillow's other decoders are rarely used and less looked at.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with others behind it, as telephones write it
MAX_PIXELS = 50_000_000  # 150 MB as RGB
MAX_BYTES = 256 << 20  # of one picture file
QUALITY = 95  # of a JPEG that must be written anew: turned, or of four colours
ORIENTATION = 0x0112  # of EXIF: 1 is upright


def read(path: Path, channels: int, height: int, width: int) -> np.ndarray:
    """Reads one picture as uint8 (channels, height, width), 1 channel grey or 3 RGB.

    It is turned as its EXIF data say, laid on white where it is transparent, and scaled without regard to its
    proportions. An animation gives its first frame. Raises BadRow for what is no picture, has less than 2 x 2 pixels or
    over 50 million, which is seen before they are unpacked.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        plain = _plain(ImageOps.exif_transpose(image), _mode(channels))
    array = np.asarray(plain.resize((width, height), Image.Resampling.BILINEAR))
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def normalised(value: bytes | str | Path | np.ndarray, channels: int) -> dict[str, Any]:
    """Returns a picture as stores keep it: {"bytes": JPEG or PNG, "height", "width"}.

    A plain JPEG or PNG of these channels keeps its bytes; what is turned by EXIF, transparent, animated, of 16 bits, a
    palette, of four colours, of a rare sampling or in another format is written anew. No colour profile is looked at.
    Raises BadRow for what cannot be decoded in full.
    """
    from PIL import ImageOps

    if isinstance(value, np.ndarray):
        return _encoded(_of_array(value, channels), "PNG")
    data = _content(value)
    with _opened(io.BytesIO(data), load=False) as image:
        mode, upright = _mode(channels), image.getexif().get(ORIENTATION, 1) == 1
        is_kept = upright and _is_plain(image, mode) and "transparency" not in image.info
        if is_kept and image.format == "PNG":
            image.load()
        if is_kept and (image.format == "PNG" or _is_sound_jpeg(data)):
            return {"bytes": data, "height": image.height, "width": image.width}
        kind = "JPEG" if image.format in JPEGS else "PNG"
        return _encoded(_plain(ImageOps.exif_transpose(image), mode), kind)


def class_map(value: bytes | str | Path | np.ndarray) -> dict[str, Any]:
    """Returns a map of classes as a grey PNG of the classes' numbers: a palette's indices, not its colours."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        if (
            value.ndim != 2
            or value.dtype.kind not in "biu"
            or (value.size and not 0 <= value.min() <= value.max() < 256)
        ):
            raise BadRow(f"expected classes 0..255 of shape (height, width), got {value.dtype} {value.shape}")
        return _encoded(Image.fromarray(value.astype(np.uint8)), "PNG")
    data = _content(value)
    with _opened(io.BytesIO(data)) as image:
        if image.format != "PNG" or image.mode not in ("P", "L", "1"):
            raise BadRow(f"is a {image.format} of mode {image.mode}; classes of pixels are a palette or grey PNG")
        if image.mode == "L":
            return {"bytes": data, "height": image.height, "width": image.width}
        return _encoded(Image.fromarray(np.asarray(image).astype(np.uint8)), "PNG")


def looked_at(value: dict[str, Any], channels: int) -> dict[str, Any]:
    """Returns what `normalised` has made before, after a look at its header."""
    if set(value) != {"bytes", "height", "width"}:
        raise BadRow(f"expected the bytes of a picture, got a dict of {', '.join(map(str, value))}")
    with _opened(io.BytesIO(value["bytes"]), load=False) as image:
        if not _is_plain(image, _mode(channels)):
            raise BadRow(f"is a {image.format} of mode {image.mode}, which stores do not keep")
        if (image.height, image.width) != (value["height"], value["width"]):
            raise BadRow(f"has {image.height} x {image.width} pixels instead of {value['height']} x {value['width']}")
    return value


def decode(data: bytes | memoryview | np.ndarray, channels: int, shrunk: int = 1) -> np.ndarray:
    """Returns the pixels of a stored picture, uint8 (height, width, channels); a JPEG at 1 / `shrunk` of its size.

    `shrunk` is 1, 2, 4 or 8 (ITU T.81: fewer cosines of each block); a PNG ignores it.
    """
    if bytes(data[:2]) == b"\xff\xd8":
        import simplejpeg

        wanted = {}
        if shrunk > 1:
            height, width = map(int, simplejpeg.decode_jpeg_header(data, strict=False)[:2])
            wanted = {"min_height": -(-height // shrunk), "min_width": -(-width // shrunk), "min_factor": shrunk}
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", strict=False, **wanted)
    with _opened(io.BytesIO(bytes(data))) as image:
        pixels = np.array(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def jpeg(pixels: np.ndarray) -> dict[str, Any]:
    """Returns pixels (height, width, channels) as a stored JPEG."""
    return _encoded(_of_array(pixels, pixels.shape[2]), "JPEG")


def png(pixels: np.ndarray) -> dict[str, Any]:
    """Returns pixels (height, width, channels) as a stored PNG."""
    return _encoded(_of_array(pixels, pixels.shape[2]), "PNG")


# ---- Pillow, guarded


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, *, load: bool = True) -> Iterator["Pillow.Image"]:
    """Opens a picture whose size is allowed, and decodes it; raises BadRow for what Pillow cannot."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the size is checked below
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image)
                if load:
                    image.load()
                yield image
    except Image.DecompressionBombError as error:
        raise BadRow(f"has too many pixels: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's, for broken files
        raise BadRow(f"is no picture that can be read ({', '.join(FORMATS)}): {error}") from error


def _content(value: bytes | str | Path) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, (str, Path)):
        if not Path(value).is_file():  # nor a pipe, for which one would wait for ever
            raise BadRow(f"{value}: cannot be read: there is no such file")
        try:
            with Path(value).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadRow(f"{value}: cannot be read: {error.strerror}") from error
    else:
        raise BadRow(f"expected the bytes of a picture, its path or an array, got {type(value).__name__}")
    if not data:
        raise BadRow("is empty")
    if len(data) > MAX_BYTES:
        raise BadRow(f"has over {MAX_BYTES} bytes")
    return data


def _check_size(image: "Pillow.Image") -> None:
    if min(image.size) < 2:
        raise BadRow(f"has {image.width} x {image.height} pixels, at least 2 x 2 are read")
    if image.width * image.height > MAX_PIXELS:
        raise BadRow(f"has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")


def _encoded(image: "Pillow.Image", kind: str) -> dict[str, Any]:
    _check_size(image)
    written = io.BytesIO()
    options = {"quality": QUALITY, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
    image.save(written, kind, **options)
    return {"bytes": written.getvalue(), "height": image.height, "width": image.width}


def _of_array(array: np.ndarray, channels: int) -> "Pillow.Image":
    from PIL import Image

    flat = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if flat.dtype != np.uint8 or flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[2] != 3):
        raise BadRow(f"expected uint8 (height, width) or (height, width, {channels}), got {array.dtype} {array.shape}")
    return Image.fromarray(flat).convert(_mode(channels))


def _is_plain(image: "Pillow.Image", mode: str) -> bool:
    """Whether `decode` gives the channels of this mode; a grey JPEG is decoded as three equal ones."""
    return (image.format == "PNG" and image.mode == mode) or (image.format in JPEGS and image.mode in (mode, "L"))


def _is_sound_jpeg(data: bytes) -> bool:
    """Whether training's decoder takes it without complaint: it knows fewer samplings of colours than Pillow's."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return False
    return True


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise BadRow(f"a picture has 1 or 3 channels, expected are {channels}")
    return "L" if channels == 1 else "RGB"


def _plain(image: "Pillow.Image", mode: str) -> "Pillow.Image":
    """Returns the picture in 8 bits a channel without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
