"""How fast stores feed a trainer, beside what is commonly used for it: benchmarks/README.md.

All have the same cores, one unless asked otherwise. Ours is one process; a DataLoader has no workers or two, and the
better counts.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image as Pillow
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of a clone

from benchmarks.side_by_side import Contender, Figures, Row, duration, in_process, in_turns, pin, rate, report
from distributed.data.derive import Wanted, derived
from distributed.data.loader import Loader
from distributed.data.order import Plan
from distributed.data.store import Store
from distributed.data.write import write
from tasks import augment
from tasks.task import Boxes, Draw, Image, Label, Labels, Picture, Task, Tokens

PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "simplejpeg", "pillow", "datasets", "webdataset", "ffcv")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OTHERS = 4096  # pictures for peers that pack their data first: their speed does not depend on how many there are
PROCESSES = 8  # that read one store at the same time
BATCHES = 10**6  # an epoch of the peers: they never begin a new one while they are measured


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    pictures: int  # of 3x32x32
    photos: int
    sequences: int
    scenes: int
    seconds: float  # that one figure takes
    rounds: int


AMOUNTS = {
    "all": Amount(55_296, 2_000, 200_000, 20_000, 2.0, 5),  # 162 MiB of pictures
    "few": Amount(13_654, 300, 20_000, 3_000, 0.2, 3),  # 40 MiB
    "tiny": Amount(256, 16, 256, 256, 0.01, 1),  # shows that it works, not how fast
}


# ---- the same for all


class Plain(Task):
    """Its default transformation is what these benchmarks want of a task."""

    fields = {"tokens": Tokens(), "boxes": Boxes(), "labels": Labels()}


def batches(store: Path, size: int, transform: Callable, order: str = "shuffle") -> Iterable[dict[str, Any]]:
    """Yields the batches of ours, epoch after epoch."""
    rows = Store(store).rows("train")
    loader = Loader(rows, Plan(len(rows), size, 0, order, rows.lengths), transform)
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


def ours(store: Path, size: int, transform: Callable, name: str, seconds: float, order: str = "shuffle") -> dict:
    def contender() -> Any:
        torch.set_num_threads(cores())
        return rate(lambda: batches(store, size, transform, order), lambda batch: batch[name], seconds)

    return {"": contender}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def peer(
    dataset: Callable[[], Dataset], size: int, main: Callable, seconds: float, collate: Callable | None = None
) -> dict[str, Contender]:
    """The DataLoader of a dataset, without workers and with two."""

    def contender(workers: int) -> Any:
        data = dataset()
        sampler = RandomSampler(data, num_samples=BATCHES * size)  # type: ignore[arg-type]
        loader = DataLoader(data, size, sampler=sampler, num_workers=workers, collate_fn=collate)
        return rate(lambda: loader, main, seconds, untimed=1 + 2 * workers)

    return {f"{workers} workers": functools.partial(contender, workers) for workers in (0, 2)}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- A: small pictures, cropped, mirrored, normalised


class SmallPictures(Dataset):
    """Pixels in memory that become pictures one by one, as torchvision's CIFAR10 holds them."""

    def __init__(self, pixels: np.ndarray) -> None:  # (rows, 32, 32, 3) uint8
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return small(Pillow.fromarray(self.pixels[row])), row % 10


small = transforms.Compose(
    [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
     transforms.Normalize(MEAN, STD)]
)  # fmt: skip


def small_u8(batch: dict, draw: Draw, training: bool) -> dict:
    image = augment.random_crop(batch["image"], draw, 32, padding=4)
    return {**batch, "image": augment.random_horizontal_flip(image, draw, inplace=True)}


def small_f32(batch: dict, draw: Draw, training: bool) -> dict:
    batch = small_u8(batch, draw, training)
    return {**batch, "image": augment.normalize(batch["image"], MEAN, STD)}


def small_pictures(folder: Path, amount: Amount) -> Iterator[Row]:
    """Yields the rows of A, of the memory that one store takes, and of the time to the first batch."""
    with in_process("write", functools.partial(write_pictures, folder, amount.pictures)) as written:
        written()
    if sys.platform == "linux":
        yield memory(folder)  # first: what this process holds, its children would share
    pixels = np.load(folder / "copy.npy")

    def first(batch: Any) -> Any:
        return batch[0]

    found = in_turns(
        {
            "f32": ours(folder / "pictures", 128, small_f32, "image", amount.seconds),
            "u8": ours(folder / "pictures", 128, small_u8, "image", amount.seconds),
            "torchvision": peer(lambda: SmallPictures(pixels), 128, first, amount.seconds),
            "HF datasets": hugging_face_pictures(pixels[:OTHERS], amount.seconds),
            "WebDataset": webdataset(folder / "shards", pixels[:OTHERS], amount.seconds),
            "ffcv": ffcv(folder / "pictures.beton", pixels, amount.seconds),
        },
        amount.rounds,
    )
    for name, mine, other, at_least in (
        ("A_f32_vs_torchvision", "f32", "torchvision", 70),
        ("A_u8_vs_torchvision", "u8", "torchvision", 70),
        ("A_f32_vs_ffcv", "f32", "ffcv", 5),
        ("A_f32_vs_hf", "f32", "HF datasets", None),
        ("A_f32_vs_webdataset", "f32", "WebDataset", None),
    ):
        yield Row(name, "rows/s", found[mine], found.get(other), other, at_least)
    yield first_batch(folder / "pictures", pixels, amount)


def write_pictures(folder: Path, count: int) -> Callable[[], float]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.save(folder / "copy.npy", pixels)
    rows = [{"image": one.transpose(2, 0, 1), "label": number % 10} for number, one in enumerate(pixels)]
    write(folder / "pictures", {"image": Image(3, 32, 32), "label": Label(classes=10)}, {"train": rows})
    return lambda: 0.0


def hugging_face_pictures(pixels: np.ndarray, seconds: float) -> dict[str, Contender]:
    if not is_installed("datasets"):
        return {}
    import datasets

    def dataset() -> Any:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        columns = {
            "image": [Pillow.fromarray(one) for one in pixels],
            "label": [row % 10 for row in range(len(pixels))],
        }
        packed = datasets.Dataset.from_dict(columns, features)
        return packed.with_transform(lambda rows: {**rows, "image": [small(one) for one in rows["image"]]})

    return peer(dataset, 128, lambda batch: batch["image"], seconds)


def webdataset(folder: Path, pixels: np.ndarray, seconds: float) -> dict[str, Contender]:
    if not is_installed("webdataset"):
        return {}
    import webdataset as wds

    folder.mkdir()
    with wds.ShardWriter(f"{folder}/%d.tar", maxcount=-(-len(pixels) // 2), verbose=0) as shards:
        for row, one in enumerate(pixels):
            written = io.BytesIO()
            Pillow.fromarray(one).save(written, "PNG")
            shards.write({"__key__": f"{row:06d}", "png": written.getvalue(), "cls": row % 10})

    def contender(workers: int) -> Any:
        data = wds.WebDataset([str(path) for path in sorted(folder.iterdir())], shardshuffle=2).shuffle(1000)
        data = data.decode("pil").to_tuple("png", "cls").map_tuple(small, int).batched(128).repeat()
        loader = wds.WebLoader(data, batch_size=None, num_workers=workers)
        return rate(lambda: loader, lambda batch: batch[0], seconds, untimed=1 + 2 * workers)

    return {f"{workers} workers": functools.partial(contender, workers) for workers in (0, 2)}


def ffcv(path: Path, pixels: np.ndarray, seconds: float) -> dict[str, Contender]:
    if not is_installed("ffcv"):
        return {}

    def contender() -> Any:
        from ffcv import fields, loader, transforms, writer
        from ffcv.fields import decoders

        columns = {"image": fields.RGBImageField(), "label": fields.IntField()}
        writer.DatasetWriter(str(path), columns).from_indexed_dataset(list(zip(pixels, itertools.cycle(range(10)))))
        in_bytes = [255 * np.array(numbers) for numbers in (MEAN, STD)]
        image = [
            decoders.SimpleRGBImageDecoder(), transforms.RandomHorizontalFlip(), transforms.RandomTranslate(padding=4),
            transforms.ToTensor(), transforms.ToTorchImage(), transforms.Convert(torch.float32),
            torchvision.transforms.Normalize(*in_bytes),
        ]  # fmt: skip
        label = [decoders.IntDecoder(), transforms.ToTensor(), transforms.Squeeze()]
        order, pipelines = loader.OrderOption.RANDOM, {"image": image, "label": label}
        made = loader.Loader(str(path), batch_size=128, num_workers=1, order=order, pipelines=pipelines)
        return rate(lambda: itertools.chain.from_iterable(itertools.repeat(made)), lambda batch: batch[0], seconds)

    return {"": contender}


def first_batch(store: Path, pixels: np.ndarray, amount: Amount) -> Row:
    def with_workers() -> Any:
        running = iter(DataLoader(SmallPictures(pixels), 128, shuffle=True, num_workers=2))
        return running, next(running)

    def without() -> Any:
        return next(iter(batches(store, 128, small_f32)))

    ways = {"ours": {"": lambda: duration(without)}, "peer": {"2 workers": lambda: duration(with_workers)}}
    found = in_turns(ways, amount.rounds)
    return Row("first_batch", "ms", found["ours"], found["peer"], "torchvision", at_most=50)


# ---- memory


def memory(folder: Path) -> Row:
    """Compares processes that have read all of one store with as many that hold a copy of it: MiB of all together."""

    def nothing() -> None:
        return None

    def mapped() -> Loader:
        rows = Store(folder / "pictures").rows("train")
        loader = Loader(rows, Plan(len(rows), 128, 0, "sequential"))
        for batch in loader.epoch(0):
            batch["image"][0, 0, 0, 0].item()
        return loader

    def copied() -> np.ndarray:
        return np.load(folder / "copy.npy")

    bare, mine, copies = held_by_all(nothing), held_by_all(mapped), held_by_all(copied)
    file = (folder / "copy.npy").stat().st_size / 2**20
    each = (mine - bare - file) / PROCESSES
    told = f"{PROCESSES} bare interpreters have {bare:.0f} MiB, the file {file:.0f}; beyond both, a process {each:.2f}"
    at_most = bare + 1.1 * file + PROCESSES * 2
    return Row(
        "memory_8_vs_copies", "MiB", Figures([mine]), Figures([copies]), "a copy each", at_most=at_most, note=told
    )


def held_by_all(way: Callable[[], Any]) -> float:
    with contextlib.ExitStack() as stack:
        each = [
            stack.enter_context(in_process(way.__name__, lambda: functools.partial(proportional, way())))
            for _ in range(PROCESSES)
        ]
        for measure in each:
            measure()  # until all have read all
        return sum(measure() for measure in each)


def proportional(held: Any) -> float:
    """This process's memory in MiB while it holds something, what is shared divided among those who share it (PSS)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


# ---- B: photographs


def photo_f32(batch: dict, draw: Draw, training: bool) -> dict:
    image = augment.random_resized_crop(batch["image"], draw, 224)
    image = augment.random_horizontal_flip(image, draw, inplace=True)
    return {**batch, "image": augment.normalize(image, MEAN, STD)}


def photos(folder: Path, amount: Amount) -> Iterator[Row]:
    files = list(made_photos(folder / "photos", amount.photos))
    rows = [{"image": path.read_bytes(), "label": int(path.parent.name)} for path in files]
    stores = {"jpeg": folder / "photo-store"}
    write(stores["jpeg"], {"image": Picture(), "label": Label(classes=10)}, {"train": rows})
    stores["256"] = derived(stores["jpeg"], Wanted(False, 256), workers=1)
    stores["decoded"] = derived(stores["jpeg"], Wanted(True, 256), workers=1)
    flow = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
         transforms.Normalize(MEAN, STD)]
    )  # fmt: skip
    image_folder = functools.partial(torchvision.datasets.ImageFolder, str(folder / "photos"), flow)
    found = in_turns(
        {name: ours(store, 64, photo_f32, "image", amount.seconds) for name, store in stores.items()}
        | {"peer": peer(image_folder, 64, lambda batch: batch[0], amount.seconds)},
        amount.rounds,
    )
    size = sum(len(row["image"]) for row in rows) / len(rows) / 1000
    for name, at_least in (("jpeg", 2.9), ("256", 5), ("decoded", 10.7)):
        told = f"JPEGs of {size:.0f} kB" if name == "jpeg" else ""
        yield Row(f"B_{name}_vs_imagefolder", "rows/s", found[name], found["peer"], "ImageFolder", at_least, note=told)


def made_photos(folder: Path, count: int) -> Iterator[Path]:
    """Writes JPEGs of 500x375 in ten folders: windows of one field of noise whose octaves fade as a photograph's do."""
    random = np.random.default_rng(0)
    field = np.full((900, 1200, 3), 120, np.float32)
    cells, strength = 7, 60.0
    while cells < 310:  # the finest waves are of four pixels
        noise = random.standard_normal((cells, cells, 3), np.float32) * [1, 0.5, 0.5]
        noise[..., 1:] += noise[..., :1]
        for channel in range(3):
            octave = Pillow.fromarray(noise[..., channel].astype(np.float32))
            field[..., channel] += strength * np.asarray(octave.resize((1200, 900), Pillow.Resampling.BICUBIC))
        cells, strength = cells * 2, strength * 0.62
    field += 5 * random.standard_normal((900, 1200, 1), np.float32)
    for number in range(count):
        top, left = random.integers(0, 900 - 375), random.integers(0, 1200 - 500)
        pixels = field[top : top + 375, left : left + 500].clip(0, 255).astype(np.uint8)
        path = folder / str(number % 10) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(pixels).save(path, quality=90)
        yield path


# ---- C: sequences


class Sequences(Dataset):
    def __init__(self, rows: list[np.ndarray] | list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"tokens": torch.as_tensor(self.rows[row]), "label": row % 2}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    tokens = pad_sequence([row["tokens"] for row in rows], batch_first=True)
    return {"tokens": tokens, "length": lengths, "label": torch.tensor([row["label"] for row in rows])}


def sequences(folder: Path, amount: Amount) -> Iterator[Row]:
    random = np.random.default_rng(0)
    lengths = random.exponential(40, amount.sequences).astype(int).clip(1, 256)
    rows = [random.integers(1, 30_000, length) for length in lengths]
    store = folder / "tokens"
    columns = [{"tokens": row, "label": number % 2} for number, row in enumerate(rows)]
    write(store, {"tokens": Tokens(), "label": Label(classes=2)}, {"train": columns})
    lists = [row.tolist() for row in rows[:OTHERS]]

    def tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["tokens"]

    found = in_turns(
        {
            "ours": ours(store, 64, Plain().transform, "tokens", amount.seconds, "length"),
            "arrays": peer(lambda: Sequences(rows), 64, tokens, amount.seconds, padded),
            "lists": peer(lambda: Sequences(lists), 64, tokens, amount.seconds, padded),
            "HF datasets": hugging_face_tokens(columns, amount.seconds),
        },
        amount.rounds,
    )
    filled = {order: efficiency(Plan(len(rows), 64, 0, order, lengths), lengths) for order in ("length", "shuffle")}
    told = f"{filled['length']:.3f} of the padded batches is tokens (>= 0.95); in random order {filled['shuffle']:.2f}"
    yield Row("C_tokens_vs_list", "rows/s", found["ours"], found["arrays"], "list of arrays", 20, note=told)
    yield Row("C_tokens_vs_python_lists", "rows/s", found["ours"], found["lists"], "list of lists", 20)
    yield Row("C_tokens_vs_hf", "rows/s", found["ours"], found.get("HF datasets"), "HF datasets", 50)


def efficiency(plan: Plan, lengths: np.ndarray) -> float:
    made = [lengths[plan.batch(0, step)] for step in range(plan.steps)]
    return float(lengths.sum() / sum(len(one) * one.max() for one in made))


def hugging_face_tokens(rows: list[Mapping[str, Any]], seconds: float) -> dict[str, Contender]:
    if not is_installed("datasets"):
        return {}
    import datasets

    def dataset() -> Any:
        return datasets.Dataset.from_list(rows[:OTHERS]).with_format("torch")

    return peer(dataset, 64, lambda batch: batch["tokens"], seconds, padded)


# ---- D: targets of detectors


class CocoTargets(Dataset):
    """The targets that torchvision's CocoDetection finds, made into tensors as its reference training does."""

    def __init__(self, path: Path) -> None:
        from pycocotools.coco import COCO

        self.coco = COCO(str(path))
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        found = self.coco.loadAnns(self.coco.getAnnIds(self.ids[row]))
        boxes = torch.as_tensor([one["bbox"] for one in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {"boxes": boxes, "labels": torch.tensor([one["category_id"] for one in found], dtype=torch.int64)}


def targets(folder: Path, amount: Amount) -> Iterator[Row]:
    random = np.random.default_rng(0)
    counts = 1 + random.poisson(6.3, amount.scenes)  # COCO has 7.3 objects a picture
    sides = [random.uniform(1, 300, (count, 4)).round(2) for count in counts]  # x, y, width, height
    classes = [random.integers(1, 91, count) for count in counts]
    rows = [
        {"boxes": np.concatenate([one[:, :2], one[:, :2] + one[:, 2:]], 1), "labels": labels}
        for one, labels in zip(sides, classes, strict=True)
    ]
    write(folder / "targets", {"boxes": Boxes(), "labels": Labels()}, {"train": rows})
    annotations = [
        {"id": image * 1000 + place, "image_id": image, "bbox": box, "category_id": label, "iscrowd": 0}
        for image, (one, labels) in enumerate(zip(sides, classes, strict=True))
        for place, (box, label) in enumerate(zip(one.tolist(), labels.tolist(), strict=True))
    ]
    pictures = [{"id": image, "height": 600, "width": 600} for image in range(amount.scenes)]
    kinds = [{"id": number, "name": str(number)} for number in range(1, 91)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": kinds}))

    def boxes(batch: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [one["boxes"] for one in batch]

    found = in_turns(
        {
            "ours": ours(folder / "targets", 64, Plain().transform, "boxes", amount.seconds),
            "peer": peer(lambda: CocoTargets(path), 64, boxes, amount.seconds, list),
        },
        amount.rounds,
    )
    yield Row("D_targets_vs_coco", "rows/s", found["ours"], found["peer"], "pycocotools", 5)


GROUPS = {"A": small_pictures, "B": photos, "C": sequences, "D": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within 50 seconds: fewer rows, shorter rounds")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--rows", choices=AMOUNTS, help="how many rows; few with --quick, else all")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS, help="leave out the others")
    parser.add_argument(
        "--cores",
        type=int,
        choices=range(1, cores() + 1),
        default=1,
        help="that ours, and each peer with its workers, may use",
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many workers as are asked for
    pin(asked.cores)
    amount = AMOUNTS[asked.rows or ("few" if asked.quick else "all")]
    with tempfile.TemporaryDirectory(prefix="whipray-benchmark-") as folder, contextlib.redirect_stdout(sys.stderr):
        rows = [row for group in GROUPS if group in asked.only for row in GROUPS[group](Path(folder), amount)]
    report(f"Feeding a trainer, cores: {asked.cores}", rows, as_json=asked.json, packages=PACKAGES)


if __name__ == "__main__":
    main()
