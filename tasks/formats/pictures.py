"""Pictures in the usual file formats, by Pillow, made into arrays of one size."""

import warnings
from pathlib import Path

import numpy as np

from tasks.errors import BadRow

# An allow-list: Pillow's other decoders are rarely used and less looked at.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_PIXELS = 50_000_000  # 150 MB as RGB


def read(path: Path, channels: int, height: int, width: int) -> np.ndarray:
    """Reads one picture as uint8 (channels, height, width), 1 channel grey or 3 RGB.

    It is turned as its EXIF data say, laid on white where it is transparent, and scaled without regard to its
    proportions. An animation gives its first frame. Raises BadRow for what is no picture or has over 50 million
    pixels, which is seen before they are unpacked.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise BadRow(f"a picture has 1 or 3 channels, expected are {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the size is checked below
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadRow(f"has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
                image.load()
                upright = ImageOps.exif_transpose(image)
                plain = _plain(upright, "L" if channels == 1 else "RGB")
    except Image.DecompressionBombError as error:
        raise BadRow(f"has too many pixels: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's, for broken files
        raise BadRow(f"is no picture that can be read ({', '.join(FORMATS)}): {error}") from error
    array = np.asarray(plain.resize((width, height), Image.Resampling.BILINEAR))
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _plain(image, mode: str):  # noqa: ANN001, ANN202 (Pillow is imported where it is used)
    """Returns the picture in 8 bits a channel without transparency."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
