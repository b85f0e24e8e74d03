"""What `train.py` trains: tasks as a user would write them, over made rows; peers share their networks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.networks.small import Standardise, cnn, mlp
from tasks.networks.text import BiLSTM
from tasks.task import Batch, Example, Facts, Image, Label, Load, Metric, Source, Task, Tokens, Vector

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, as everybody writes them
WORDS = 20_000  # of the texts' vocabulary
LONGEST = 128  # words of a text; about half as many on average
OTHER_WORDS = 8_000  # of either language
SENTENCE = 24  # words of a sentence that is translated; about half as many on average
WIDE = 2_650  # of the network whose state, with Adam's, is 87 MB


@dataclass(frozen=True, kw_only=True)
class Made(Source):
    """Rows that come from their number alone."""

    rows: int = 128  # of the training split; validation and test have 128 each


class Work(Task):
    source: Made = Made()

    def examples(self, source: Source) -> Iterable[Example]:
        assert isinstance(source, Made)
        for split, count in (("train", source.rows), ("validation", 128), ("test", 128)):
            yield from (Example([len(split), number], split) for number in range(count))

    def row(self, reference: list[int]) -> dict[str, Any]:
        return self.made(np.random.default_rng(reference))

    def made(self, random: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


def text(random: np.random.Generator, words: int, longest: int) -> np.ndarray:
    return random.integers(1, words, random.integers(2, longest + 1))


class Mlp(Work):
    """A picture of 28x28 bytes -> one of 10 classes."""

    fields = {"image": Image(1, 28, 28), "label": Label(classes=10)}

    def made(self, random: np.random.Generator) -> dict[str, Any]:
        return {"image": random.integers(0, 256, (1, 28, 28), np.uint8), "label": int(random.integers(10))}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.Sequential(Standardise([MEAN], [STD]), mlp(784, (256, 128), 10))


class Cnn(Mlp):
    recipe = {"precision.channels_last": True}  # 1.3 x on this network, on a CPU too; peers leave it as it is

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return nn.Sequential(Standardise([MEAN], [STD]), cnn((1, 28, 28), 32, 10))


class Lstm(Work):
    """A text -> one of two classes."""

    fields = {"tokens": Tokens(), "label": Label(classes=2)}

    def made(self, random: np.random.Generator) -> dict[str, Any]:
        return {"tokens": text(random, WORDS, LONGEST), "label": int(random.integers(2))}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return BiLSTM(WORDS, 128, 128, 2)


class Translator(nn.Module):
    """GRU to GRU with attention (Luong et al., 2015, "dot")."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.read, self.written = nn.Embedding(OTHER_WORDS, width, 0), nn.Embedding(OTHER_WORDS, width, 0)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.mix, self.choose = nn.Linear(2 * width, width), nn.Linear(width, OTHER_WORDS)

    def forward(self, words: Tensor, translation: Tensor) -> Tensor:  # (B, S), (B, T) int64 -> (B, T, OTHER_WORDS)
        states, last = self.encoder(self.read(words))
        decoded, _ = self.decoder(self.written(translation), last)
        scores = decoded @ states.transpose(1, 2)  # (B, T, S)
        context = scores.masked_fill((words == 0)[:, None], float("-inf")).softmax(-1) @ states
        return self.choose(torch.tanh(self.mix(torch.cat([decoded, context], -1))))


def translation_loss(network: nn.Module, words: Tensor, translation: Tensor) -> Tensor:
    """Each word is foretold from those before it; a mean over words."""
    scores = network(words, translation[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), translation[:, 1:].flatten(), ignore_index=0)


class Seq2seq(Work):
    """A sentence -> another one."""

    fields = {"words": Tokens(), "translation": Tokens(target=True)}

    def made(self, random: np.random.Generator) -> dict[str, Any]:
        words, translation = (text(random, OTHER_WORDS, SENTENCE) for _ in range(2))
        return {"words": words, "translation": translation}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return Translator()

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": translation_loss(model, batch["words"], batch["translation"])}

    def units(self, batch: Batch) -> Tensor:
        return (batch["translation"][:, 1:] != 0).sum()

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        return {}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {}


class Wide(Work):
    """Many weights and little to compute: for the time that a checkpoint takes."""

    fields = {"numbers": Vector(64), "label": Label(classes=2)}

    def made(self, random: np.random.Generator) -> dict[str, Any]:
        return {"numbers": random.random(64, np.float32), "label": int(random.integers(2))}

    def build(self, facts: Facts, load: Load) -> nn.Module:
        return mlp(64, (WIDE, WIDE), 2)
