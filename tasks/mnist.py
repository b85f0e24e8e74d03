"""MNIST and what shares its format: pictures of 28x28 pixels in four IDX files, or in mnist.npz."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import cache
from tasks.formats import idx, npz
from tasks.glyphs import Glyphs
from tasks.task import Example, Image, Label, Source, UserError

# The four files by their original names, and what mnist.npz calls their arrays.
FILES = (
    ("train-images-idx3-ubyte", "x_train"),
    ("train-labels-idx1-ubyte", "y_train"),
    ("t10k-images-idx3-ubyte", "x_test"),
    ("t10k-labels-idx1-ubyte", "y_test"),
)
SIZE = (28, 28)  # rows, columns
CLASSES = 10
MAX_UNPACKED = 2**30  # bytes of one array in an .npz; MNIST's largest has 47 MB
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Mnist(Glyphs):
    """Handwritten digits: a 28x28 grey picture, light ink on dark -> one of 10 classes. 60,000 + 10,000 of them.

    LeCun, Cortes and Burges, 1998. task.source.path is a folder with the four IDX files (gzipped or not) or
    mnist.npz, or that file; where it is empty the files are downloaded once into the user's cache.
    The split is the source's own. What correct training reaches: CNN 99.2 %, MLP 98.4 %.
    """

    fields = {"image": Image(1, 28, 28), "label": Label(classes=10)}
    recipe = {
        "train.epochs": 10, "data.batch_size": 128, "optimizer.name": "adam", "optimizer.lr": 3e-3,
        "schedule.name": "onecycle", "precision.channels_last": True,  # a third quicker
    }  # fmt: skip

    def files(self) -> list[Path]:
        """The four IDX files, or the one .npz; downloads them first where the source is empty and has a network."""
        path = self._folder()
        if path.suffix == ".npz":
            return [path]
        if (path / "mnist.npz").exists():
            return [path / "mnist.npz"]
        return [_find(path, name) for name, _ in FILES]

    def examples(self, source: Source) -> Iterator[Example]:
        files = self.files()
        if len(files) == 1:
            arrays = npz.read(files[0], [key for _, key in FILES], MAX_UNPACKED)
            files = files * len(FILES)
        else:
            arrays = [idx.read(file) for file in files]
        for split, at in (("train", 0), ("test", 2)):
            images, labels = arrays[at : at + 2]
            if images.dtype != np.uint8 or images.shape[1:] != SIZE:
                raise UserError(
                    f"{files[at]}: expected uint8 pictures of shape {SIZE}, got {images.dtype} {images.shape[1:]}",
                    "check that this file holds the pictures",
                )
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                raise UserError(
                    f"{files[at + 1]}: {len(labels)} labels of shape {labels.shape[1:]} for {len(images)} pictures",
                    "take pictures and labels from one source",
                )
            if labels.size and not 0 <= labels.min() <= labels.max() < CLASSES:
                raise UserError(
                    f"{files[at + 1]}: holds the labels {labels.min()}..{labels.max()}, expected 0..{CLASSES - 1}",
                    "check that this file belongs to the pictures",
                )
            yield from (Example(pair, split) for pair in zip(images, labels.tolist(), strict=True))

    def row(self, reference: tuple[np.ndarray, int]) -> dict:
        picture, label = reference  # (28, 28) uint8
        return {"image": picture[None], "label": label}

    def _folder(self) -> Path:
        return Path(self.source.path) if self.source.path else _downloaded()


class Fashion(Mnist):
    """Clothes: a 28x28 grey picture, light on dark -> one of 10 classes. 1,000 + 200 bundled; 60,000 + 10,000 exist.

    Xiao, Rasul and Vollgraf, 2017. task.source.path is a folder with the four IDX files of the whole set, where it
    is at hand. The split is the source's own. Reached on the bundled rows, mean of three seeds: CNN 84 % in 15 s on one
    core, MLP 82 % in 1.5 s; with 200 test rows that is good to 2.6 %.
    """

    fields = {"image": Image(1, 28, 28), "label": Label(names=CLOTHES)}
    recipe = {
        "train.epochs": 15, "data.batch_size": 64, "optimizer.name": "adam", "optimizer.lr": 1e-3,
        "schedule.name": "onecycle", "precision.channels_last": True,  # a third quicker
    }  # fmt: skip

    def _folder(self) -> Path:
        return Path(self.source.path) if self.source.path else Path(__file__).parent / "bundled" / "fashion"


def _find(folder: Path, name: str) -> Path:
    """Returns the file of this name, gzipped or not, in the folder or where torchvision would put it."""
    places = [folder, folder / "raw", folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw"]
    # Some distributions write a point before "idx". The .gz comes first: its checksum tells a broken download.
    names = [f"{name}.gz", name, f"{name.replace('-idx', '.idx')}.gz", name.replace("-idx", ".idx")]
    for candidate in (place / name for place in places for name in names):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{folder}: there is no {name} or {name}.gz" if folder.is_dir() else f"{folder}: no such folder",
        f"task.source.path must be a folder with {', '.join(name for name, _ in FILES)} (.gz or not), or mnist.npz",
    )


def _downloaded() -> Path:
    """Returns the folder in the user's cache that holds MNIST, downloaded by torchvision at the first call."""
    folder = cache.folder("raw") / "mnist"
    with contextlib.suppress(UserError):
        for name, _ in FILES:
            _find(folder, name)
        return folder
    from torchvision import datasets

    try:
        with contextlib.redirect_stdout(sys.stderr):  # its progress is no answer of ours
            datasets.MNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "MNIST cannot be downloaded here: " + " ".join(str(error).split()),
            f"on a machine with a network get {', '.join(f'{name}.gz' for name, _ in FILES)}, put them into {folder}, "
            "or into any folder that task.source.path names. The task 'fashion' needs no download.",
        ) from error
    return folder
