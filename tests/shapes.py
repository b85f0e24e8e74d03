"""Small tasks of the shapes that the bundled ones do not have: two optimizers, boxes, counted units, a teacher."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks import augment, metrics
from tasks.formats import pictures
from tasks.task import (
    Batch,
    Boxes,
    Draw,
    Example,
    Facts,
    Image,
    Label,
    Labels,
    Load,
    Metric,
    Picture,
    Source,
    Task,
    Text,
    Tokens,
    Update,
    Vector,
    frozen,
)  # fmt: skip


class Adversarial(Task):
    """Points on a circle, imitated: a generator and a discriminator with an optimizer each."""

    fields = {"point": Vector(2)}
    entries = ("generator", "discriminator")
    recipe = {"train.objective": "spread", "data.batch_size": 32, "train.epochs": 2, "optimizer.name": "adam"}

    def examples(self, source: Source) -> Iterable[dict]:
        angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 160)
        return [{"point": [np.cos(a), np.sin(a)]} for a in angles]

    def transform(self, batch: Batch, draw: Draw, training: bool) -> Batch:
        return {**batch, "noise": torch.stack([draw.normal(), draw.normal()], 1)}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        def net(outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, outputs))

        return nn.ModuleDict({"generator": net(2), "discriminator": net(1)})

    def step(self, model: nn.ModuleDict, batch: Batch, update: Update) -> dict[str, Tensor]:
        made = model["generator"](batch["noise"])
        with frozen(model["discriminator"]):
            fool = functional.softplus(-model["discriminator"](made)).mean()
        update(fool, "generator")
        both = torch.cat([batch["point"], made.detach()])
        scores = model["discriminator"](both)
        truth = torch.cat([torch.ones(len(made), 1), torch.zeros(len(made), 1)]).to(scores)
        judge = functional.binary_cross_entropy_with_logits(scores, truth)
        update(judge, "discriminator")
        return {"generator": fool, "discriminator": judge}

    def predict(self, model: nn.ModuleDict, batch: Batch) -> dict[str, Any]:
        return {"point": model["generator"](batch["noise"])}

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        return {"spread": metrics.rmse()}

    def measure(self, metrics: dict[str, Metric], prediction: dict[str, Any], batch: Batch) -> None:
        radius = prediction["point"].norm(dim=1)
        metrics["spread"].update(radius, torch.ones_like(radius))


class Detector(Task):
    """Any number of bright squares in a picture: a dict of losses, boxes as lists of tensors."""

    fields = {"image": Image(1, 16, 16), "boxes": Boxes(), "labels": Labels()}
    recipe = {"data.batch_size": 16, "train.epochs": 2, "optimizer.lr": 0.01}

    def examples(self, source: Source) -> Iterable[int]:
        return range(80)

    def row(self, reference: int) -> dict:
        rng = np.random.default_rng(reference)
        image, boxes = rng.integers(0, 40, (1, 16, 16)), []
        for _ in range(rng.integers(0, 4)):
            x, y = rng.integers(0, 12, 2)
            image[0, y : y + 4, x : x + 4] = 255
            boxes.append([x, y, x + 4, y + 4])
        return {"image": image, "boxes": boxes, "labels": [0] * len(boxes)}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2))

    def _targets(self, batch: Batch) -> Tensor:  # (B, 1, 16, 16): 1 where a box lies
        heat = torch.zeros_like(batch["image"])
        for row, boxes in enumerate(batch["boxes"]):
            for x1, y1, x2, y2 in boxes.int().tolist():
                heat[row, :, y1:y2, x1:x2] = 1
        return heat

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        heat, truth = model(batch["image"]), self._targets(batch)
        count = torch.tensor([len(labels) for labels in batch["labels"]]).to(heat)
        return {
            "heat": functional.binary_cross_entropy_with_logits(heat, truth),
            "count": 1e-3 * functional.mse_loss(heat.sigmoid().sum((1, 2, 3)) / 16, count),
        }

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {"heat": model(batch["image"]).sigmoid() > 0.5}

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        return {"pixels": metrics.accuracy()}

    def measure(self, metrics: dict[str, Metric], prediction: dict[str, Any], batch: Batch) -> None:
        metrics["pixels"].update(prediction["heat"].flatten(), self._targets(batch).flatten() > 0)


class Photos(Task):
    """Pictures of any size, as files: cropped while they are decoded, and mixed with another one of the batch."""

    partners = 1
    fields = {"photo": Picture(), "label": Label(names=("stripes", "checks"))}
    recipe = {"data.batch_size": 20, "train.epochs": 2, "optimizer.lr": 0.02}

    def examples(self, source: Source) -> Iterable[int]:
        return range(100)

    def row(self, reference: int) -> dict:
        rng = np.random.default_rng(reference)
        y, x = np.mgrid[: rng.integers(24, 40), : rng.integers(24, 40)]
        waves = np.sin(y / 2 + rng.uniform(0, 6)) * (np.sin(x / 2) if reference % 2 else 1)
        pixels = np.stack([127 + 100 * waves] * 3, 2).astype(np.uint8)
        kind = pictures.png if reference % 5 == 0 else pictures.jpeg
        return {"photo": kind(pixels)["bytes"], "label": reference % 2}

    def transform(self, batch: Batch, draw: Draw, training: bool) -> Batch:
        targets = functional.one_hot(batch["label"], 2).float() if "label" in batch else None
        if not training:
            images = augment.central_resized_crop(batch["photo"], 16, shorter=16)
            return {**batch, "photo": augment.normalize(images, (0.5,) * 3, (0.4,) * 3), "targets": targets}
        images = augment.random_resized_crop(batch["photo"], draw, 16, scale=(0.5, 1.0))
        images = augment.normalize(augment.random_horizontal_flip(images, draw), (0.5,) * 3, (0.4,) * 3)
        images, targets = augment.mixup(images, targets, draw, alpha=0.2, partner=batch["partner"][:, 0])
        return {**batch, "photo": images, "targets": targets}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
        )

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": functional.cross_entropy(model(batch["photo"]), batch["targets"])}


class Unpaired(Task):
    """Two sets of points without pairs, each moved onto the other: two networks, an optimizer each."""

    fields = {"point": Vector(2)}
    entries = ("there", "back")
    recipe = {"data.batch_size": 20, "train.epochs": 2, "optimizer.lr": 0.02, "train.objective": "cycle"}

    def examples(self, source: Source) -> Iterable[Example]:
        rng = np.random.default_rng(0)
        yield from (Example({"point": row}, domain="left") for row in rng.normal(-1, 0.3, (120, 2)))
        yield from (Example({"point": row}, domain="right") for row in rng.normal(1, 0.5, (70, 2)))

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.ModuleDict({"there": nn.Linear(2, 2), "back": nn.Linear(2, 2)})

    def step(self, model: nn.ModuleDict, batch: Batch, update: Update) -> dict[str, Tensor]:
        left, right = batch["left"]["point"], batch["right"]["point"]
        moved, returned = model["there"](left), model["back"](right)
        there = (moved - left - 2).square().mean()
        update(there, "there")
        back = (returned - right + 2).square().mean()
        update(back, "back")
        return {"there": there, "back": back}

    def predict(self, model: nn.ModuleDict, batch: Batch) -> dict[str, Any]:
        return {"point": model["back"](model["there"](batch["left"]["point"]))}

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        return {"cycle": metrics.rmse()}

    def measure(self, metrics: dict[str, Metric], prediction: dict[str, Any], batch: Batch) -> None:
        metrics["cycle"].update(prediction["point"].flatten(), batch["left"]["point"].flatten())


class Noisy(Detector):
    """The detector with dropout and batch normalisation: equal in distribution only, and resumed to the bit."""

    invariance = "dropout and batch normalisation"

    def build(self, facts: Facts, load: Load) -> nn.Module:
        middle = nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        return nn.Sequential(*middle, nn.Conv2d(8, 1, 5, padding=2))

    def transform(self, batch: Batch, draw: Draw, training: bool) -> Batch:
        out = super().transform(batch, draw, training)
        if training:  # torch's own generator is seeded too
            out["image"] = out["image"] + 0.01 * torch.rand_like(out["image"])
        return out


class Words(Task):
    """Which word comes next, in sentences of any length: the loss is a mean over words, and some rows have none."""

    fields = {"words": Tokens(), "text": Text()}
    recipe = {
        "data.batch_size": 12,
        "train.epochs": 2,
        "data.order": "length",
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
    }

    def examples(self, source: Source) -> Iterable[dict]:
        rng = np.random.default_rng(1)
        lengths = np.where(rng.random(120) < 0.3, 1, rng.integers(1, 12, 120))
        return [{"words": [1, *(1 + np.arange(n) % 5)][:n], "text": f"row {i}"} for i, n in enumerate(lengths)]

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))

    def units(self, batch: Batch) -> int:
        return int((batch["words_length"] - 1).clamp(min=0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        scores, following = model(batch["words"][:, :-1]), batch["words"][:, 1:]
        return {"next": functional.cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=0)}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {"next": model(batch["words"]).argmax(-1)}

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        return {}


class Student(Task):
    """Learns a frozen teacher's answers: what `load` gives is neither trained nor saved."""

    teacher: str = ""  # RUN whose network is imitated
    free: bool = False  # whether the teacher learns too
    early: bool = False  # whether the teacher is loaded before the student is made

    fields = {"image": Image(1, 8, 8), "label": Label(classes=10)}
    recipe = {"data.batch_size": 64, "train.epochs": 1}

    def examples(self, source: Source) -> Iterable[dict]:
        rng = np.random.default_rng(0)
        return [{"image": rng.integers(0, 256, (1, 8, 8)), "label": i % 10} for i in range(200)]

    def build(self, facts: Facts, load: Load) -> nn.Module:
        teacher = load(self.teacher)[0] if self.early else None
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        teacher = teacher or load(self.teacher)[0]
        return _Pair(student, teacher.requires_grad_(self.free))

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        mine, theirs = model(batch["image"], both=True)
        return {"imitation": functional.kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")}


class _Pair(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor, both: bool = False) -> Any:
        mine = self.student(x)
        if not both:
            return mine
        with torch.no_grad():
            return mine, self.teacher(x)
