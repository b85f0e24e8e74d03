"""PASCAL VOC: lists of pictures, XML files with their objects, and palette PNGs with the class of every pixel.

Everingham and Winn, "The PASCAL VOC2012 Challenge Development Kit", sections 4 to 8.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tasks.errors import BadRow, UserError, did_you_mean
from tasks.formats import coco, pictures, table

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

# In the order of their palette indices, from 1 on; 0 is the background.
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255  # borders, and objects too difficult to outline
MAX_BYTES = 16 << 20  # of one XML file; VOC's have up to 20 kB
MAX_DEPTH = 32  # elements within elements; VOC has 4


class Files(NamedTuple):
    """A reference: the files of one picture; not each picture has all of them."""

    picture: Path
    annotation: Path
    class_map: Path
    object_map: Path


def examples(
    root: Path, image_set: str, years: Sequence[int] = (), kind: Literal["Main", "Segmentation"] = "Main"
) -> list[Files]:
    """Lists the pictures of an image set (train, val, trainval, test) of several years, one year after the other.

    `root` is VOCdevkit, which holds VOC2007 and the like, or one such folder. No years are all that have the set.
    Raises UserError where a set is not there, is empty, or names something else than pictures.
    """
    if years:
        folders = [root / f"VOC{year}" for year in years]
    elif (root / "ImageSets").is_dir():
        folders = [root]
    else:
        folders = [folder for folder in sorted(root.glob("VOC*")) if _list(folder, kind, image_set).is_file()]
    if not folders:
        raise UserError(
            f"{root}: holds no VOC folder with the image set ImageSets/{kind}/{image_set}.txt",
            "name the folder VOCdevkit, which holds VOC2007, or VOC2007 itself",
        )
    return [files for folder in folders for files in _of_one_year(folder, image_set, kind)]


def objects(path: Path, classes: Sequence[str] = CLASSES, picture: Path | None = None) -> dict[str, Any]:
    """Parses one annotation; where `picture` is given it must be there and be of the size that is declared.

    Returns "boxes" (objects, 4) float32 x1 y1 x2 y2 in pixels from 0 (VOC counts from 1, and the last one is within),
    "labels" and "pose" as lists of text, "difficult", "truncated" and "occluded" (objects,) bool, "height" and "width".
    Raises BadRow for a broken annotation; UserError for one that attacks (a DTD, excessive nesting, a file name that
    leads out of its folder), and for a class that is none of `classes`, where there are any.
    """
    root = _root(path)
    coco.beneath(path.parent, root.findtext("filename") or "", f"{path}, filename")
    height, width = (int(_number(root.find("size"), side, path, "size")) for side in ("height", "width"))
    if picture is not None:
        coco.check_size(picture, height, width, str(picture))
    found = root.findall("object")
    labels, boxes = [], []
    for number, one in enumerate(found, 1):
        name = (one.findtext("name") or "").strip()
        place = f"object {number} ({name})"
        if not name:
            raise BadRow(f"{path}: object {number} has no name")
        if classes and name not in classes:
            raise UserError(
                f"{path}: object {number} is of the unknown class {name[:40]!r}",
                did_you_mean(name, classes) or "name the classes of this data set",
            )
        x1, y1, x2, y2 = (_number(one.find("bndbox"), side, path, place) for side in ("xmin", "ymin", "xmax", "ymax"))
        # One pixel wide would be legal; VOC has no such object, but programs write a slip of the mouse like this.
        if x1 >= x2 or y1 >= y2:
            raise BadRow(f"{path}: {place} has a box without area: x {x1:g}..{x2:g}, y {y1:g}..{y2:g}")
        boxes.append(coco.box([[x1 - 1, y1 - 1], [x2, y2]], height, width, f"{path}: {place}"))
        labels.append(name)
    marks = {
        mark: np.array([_mark(one, mark, path) for one in found], bool)
        for mark in ("difficult", "truncated", "occluded")
    }
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": labels,
        **marks,
        "pose": [(one.findtext("pose") or "Unspecified").strip() for one in found],
        "height": height,
        "width": width,
    }


def class_map(path: Path, classes: Sequence[str] = CLASSES) -> np.ndarray:
    """Reads the class of every pixel: (height, width) uint8, 0 background, 1.. the `classes`, 255 void.

    Raises BadRow for what is no palette or grey PNG, and for a number that is no class.
    """
    found = _indices(path)
    strange = found[(found > len(classes)) & (found != VOID)]
    if strange.size:
        raise BadRow(f"{path}: holds the class {strange[0]}, expected 0..{len(classes)} or {VOID}")
    return found


def segments(files: Files, classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    """Reads the classes of all pixels and the outlines of all objects of one picture.

    Returns "class_map" (height, width) uint8 as `class_map` does, "masks" as a list of RLE dicts, "labels" as a list of
    names, "boxes" (objects, 4) float32 x1 y1 x2 y2 in pixels. Raises BadRow where the files do not belong together.
    """
    from pycocotools import mask

    pixels, numbers = class_map(files.class_map, classes), _indices(files.object_map)
    if pixels.shape != numbers.shape:
        raise BadRow(f"{files.object_map}: is of size {numbers.shape}, the map of classes of size {pixels.shape}")
    coco.check_size(files.picture, pixels.shape[0], pixels.shape[1], str(files.picture))
    masks: Any = []
    labels = []
    for number in np.setdiff1d(numbers, (0, VOID)):
        one = numbers == number
        label = int(np.bincount(pixels[one]).argmax())  # of a stray pixel or two at the border the many decide
        if label in (0, VOID):
            raise BadRow(f"{files.object_map}: object {number} has no class in {files.class_map.name}")
        masks.append(mask.encode(np.asfortranarray(one.astype(np.uint8))))
        labels.append(classes[label - 1])
    boxes = mask.toBbox(masks).reshape(-1, 4).astype(np.float32) if masks else np.zeros((0, 4), np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return {"class_map": pixels, "masks": masks, "labels": labels, "boxes": boxes}


# ---- lists


def _list(folder: Path, kind: str, image_set: str) -> Path:
    return folder / "ImageSets" / kind / f"{image_set}.txt"


def _of_one_year(folder: Path, image_set: str, kind: str) -> list[Files]:
    path, images = _list(folder, kind, image_set), folder / "JPEGImages"
    if not path.is_file():
        there = [file.stem for file in path.parent.glob("*.txt") if "_" not in file.stem]  # car_train is of one class
        raise UserError(f"{path}: no such image set", did_you_mean(image_set, there) or f"check the folder {folder}")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder", "the pictures of VOC lie there")
    found = {file.stem: file for file in images.iterdir() if file.suffix.lower() in pictures.SUFFIXES}
    listed: dict[str, Files] = {}
    for line, text in enumerate(table.text(path).splitlines(), 1):
        name = text.strip()
        if not name:
            continue
        if len(name.split()) > 1 or set(name) & set("/\\") or name in (".", ".."):
            raise UserError(
                f"{path}, line {line}: expected the name of a picture, got {name[:80]!r}", "one name a line"
            )
        if name in listed:
            raise UserError(f"{path}, line {line}: names {name} a second time", "name each picture once")
        listed[name] = Files(
            found.get(name, images / f"{name}.jpg"),
            folder / "Annotations" / f"{name}.xml",
            folder / "SegmentationClass" / f"{name}.png",
            folder / "SegmentationObject" / f"{name}.png",
        )
    if not listed:
        raise UserError(f"{path}: is empty", "one name of a picture a line, without .jpg")
    return list(listed.values())


# ---- one annotation


def _root(path: Path) -> "Element":
    from defusedxml import DefusedXmlException, ElementTree

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadRow(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: has over {MAX_BYTES} bytes", "an annotation of one picture is far smaller")
    events: Any = ElementTree.iterparse(io.BytesIO(raw), ("start", "end"), forbid_dtd=True)
    depth = 0
    try:
        for event, _ in events:
            depth += 1 if event == "start" else -1
            if depth > MAX_DEPTH:
                raise UserError(f"{path}: is nested deeper than {MAX_DEPTH} elements", "annotations of VOC have 4")
    except DefusedXmlException as error:
        raise UserError(f"{path}: declares a DTD or entities, which can attack: {error}", "remove the DTD") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # of the XML, or of its encoding
        raise BadRow(f"{path}: is no XML that can be read: {error}") from error
    if events.root.tag != "annotation":
        raise BadRow(f"{path}: is no annotation of VOC, which begins with <annotation>")
    return events.root


def _number(parent: "Element | None", name: str, path: Path, place: str) -> float:
    text = parent.findtext(name) if parent is not None else None
    if text is None:
        raise BadRow(f"{path}: {place} has no {name}")
    try:
        value = float(text)
    except ValueError:
        raise BadRow(f"{path}: {place} has {text[:40]!r} as {name}, expected a number") from None
    if not np.isfinite(value):
        raise BadRow(f"{path}: {place} has {text.strip()} as {name}, expected a finite number")
    return value


def _mark(one: "Element", name: str, path: Path) -> bool:
    text = (one.findtext(name) or "0").strip()
    if text not in ("0", "1"):
        raise BadRow(f"{path}: expected 0 or 1 as {name}, got {text[:40]!r}")
    return text == "1"


def _indices(path: Path) -> np.ndarray:
    """Returns the palette indices of a PNG, never its colours: (height, width) uint8."""
    try:
        return pictures.decode(pictures.class_map(path)["bytes"], 1)[:, :, 0]
    except BadRow as error:
        raise BadRow(f"{path.name}: {error}") from error
