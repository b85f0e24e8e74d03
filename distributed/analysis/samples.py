"""What a network says about the first rows of validation: a grid of pictures, or a table; and what it looks like.

Looks only: a batch is made once and kept, no generator of random numbers moves, no gradient is left behind.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from torch import Tensor, nn

from distributed.data import planned
from distributed.data.loader import ONE
from distributed.data.store import Store
from distributed.run import Run
from distributed.world import World
from tasks.columns import Ragged
from tasks.fields import Boxes, ClassMap, Field, Image, Label, Labels, ObjectMasks, Picture, Tokens
from tasks.task import Batch, Task

SIDE, LINE = 160, 14  # pixels: a picture's longer side, a line of words under it
ACROSS = 4  # rows of the data side by side
MOST_LINES, WORDS = 4, 60  # under a picture; characters of a cell
TRUTH, TOLD = "#2ca02c", "#d62728"
COLOURS = np.array([[0, 0, 0], *np.random.default_rng(7).integers(60, 255, (254, 3)), [255, 255, 255]], np.uint8)
BINS = 64  # of a histogram
log = logging.getLogger("whipray")
Cell = str | np.ndarray  # words, or a picture (height, width, 3) uint8


class Samples:
    """The first rows of validation, ready to be predicted; belongs to one rank."""

    def __init__(self, run: Run, store: Store, device: torch.device, most: int) -> None:
        self.run, self.facts, self.device = run, store.facts, device
        most = min(most, run.data.most or most)
        split = "train" if run.data.overfit else "validation"  # what a run is judged by
        data = replace(run.data, overfit=most) if run.data.overfit else replace(run.data, limit=most)
        with self._quietly():
            loader = planned.loader(
                store, split, data, run.train.seed, run.transform, World(device=device), training=False
            )
            self.batch: Batch = next(loader.in_order(most))
        self.inputs: dict[str, list[Cell]] = {}
        self.boxes: dict[str, list[Any]] = {}
        self.fields: dict[str, Field] = {}  # by the name under which a column is shown
        for domain in store.domains(split) or [ONE]:
            rows = store.rows(split, most, domain or None)
            columns = rows.take(np.arange(len(rows)))
            for name, field in store.fields.items():
                self._add(f"{domain}/{name}".lstrip("/"), name, field, columns[name], len(rows))

    def _add(self, shown: str, name: str, field: Field, column: Any, rows: int) -> None:
        values = [_value(field, column, place) for place in range(rows)]
        self.fields[shown] = field
        if isinstance(field, Boxes):
            self.boxes[shown] = values
        elif not isinstance(field, ObjectMasks):
            self.inputs[shown] = [_cell(field, self.facts.get(name, {}), value) for value in values]

    def _quietly(self) -> Any:
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def predicted(self, network: nn.Module) -> dict[str, list[Any]]:
        """Returns what the task predicts for the rows, by column: words, pictures, or boxes as lists."""
        network.eval()
        with self._quietly(), torch.no_grad(), self.run.precision.autocast(self.device):
            told = self.run.task.predict(network, self.batch)
        fields = self.run.task.fields
        return {name: _told(values, fields.get(name), self.facts.get(name, {})) for name, values in told.items()}

    def drawn(self, network: nn.Module) -> np.ndarray | str:
        """Returns a picture (height, width, 3) uint8 of all rows where the data hold pictures, else a Markdown table.

        Truth and prediction stand side by side; boxes are green where they are true, red where they are predicted.
        """
        told = self.predicted(network)
        cells = {**self.inputs, **{f"predicted {name}": values for name, values in told.items()}}
        if any(isinstance(value, np.ndarray) for values in cells.values() for value in values[:1]):
            return self._grid(cells, told)
        rows = max(map(len, self.inputs.values()), default=0)
        shown = {name: [str(value) for value in values] for name, values in cells.items() if len(values) == rows}
        return _table(shown, rows)

    def _grid(self, cells: Mapping[str, list[Any]], told: Mapping[str, list[Any]]) -> np.ndarray:
        rows = max(len(values) for values in cells.values())
        tiles = [self._tile(cells, told, place) for place in range(rows)]
        width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
        across = min(ACROSS, rows)
        sheet = Pillow.new("RGB", (across * width, -(-rows // across) * height), "white")
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (place % across * width, place // across * height))
        return np.asarray(sheet)

    def _tile(self, cells: Mapping[str, list[Any]], told: Mapping[str, list[Any]], place: int) -> Pillow.Image:
        mine = {name: values[place] for name, values in cells.items() if place < len(values)}
        pictures, words = [], []
        for name, value in mine.items():
            if isinstance(value, np.ndarray):
                boxes = self._boxes(told, place) if isinstance(self.fields.get(name), (Image, Picture)) else []
                pictures.append(_fitted(value, boxes))
            elif name.removeprefix("predicted ") not in self.boxes:
                words.append((f"{name}: {value}", TOLD if self._is_wrong(name, mine) else "black"))
        width = max(sum(picture.width + 4 for picture in pictures), SIDE)
        height = max((picture.height for picture in pictures), default=0)
        tile = Pillow.new("RGB", (width + 4, height + LINE * min(len(words), MOST_LINES) + 8), "white")
        left = 2
        for picture in pictures:
            tile.paste(picture, (left, 2))
            left += picture.width + 4
        draw = ImageDraw.Draw(tile)
        for line, (text, colour) in enumerate(words[:MOST_LINES]):
            draw.text((2, height + 4 + LINE * line), text[: width // 6], fill=colour)
        return tile

    def _is_wrong(self, name: str, mine: Mapping[str, Any]) -> bool:
        """Whether a class was predicted, and another one is true."""
        truth = name.removeprefix("predicted ")
        return truth != name and isinstance(self.fields.get(truth), Label) and mine[name] != mine[truth]

    def _boxes(self, told: Mapping[str, list[Any]], place: int) -> list[tuple[Any, str]]:
        """The row's boxes, xyxy in pixels, each with its colour."""
        found = []
        for name, truth in self.boxes.items():
            found += [(box, TRUTH) for box in truth[place]]
            if place < len(told.get(name, [])):
                found += [(box, TOLD) for box in np.reshape(told[name][place], (-1, 4)).tolist()]
        return found

    # ---- the network itself

    def histograms(self, network: nn.Module) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yields a tag, counts and edges for each parameter, and for its gradient on the rows shown.

        The gradients of the training steps are gone when a network is judged; these are of the loss on the rows of
        validation, without dropout. A task that has no loss to look at has none.
        """
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        yield from (_binned(f"weights/{name}", parameter) for name, parameter in learning.items())
        task = self.run.task
        if learning and (type(task).loss is not Task.loss or type(task).step is Task.step):
            network.eval()
            # cuDNN's recurrent layers know no backward of what was judged.
            with self._quietly(), torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
                with self.run.precision.autocast(self.device):
                    loss = torch.stack(list(task.loss(network, self.batch).values())).sum()
                gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
            for name, gradient in zip(learning, gradients, strict=True):
                if gradient is not None:
                    yield _binned(f"gradients/{name}", gradient)

    def graph(self, network: nn.Module) -> bytes | None:
        """Returns the operations of the network as a GraphDef for TensorBoard; None and a warning if torch cannot."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and what TensorBoard shows is made of it
            from torch.utils.tensorboard._pytorch_graph import graph

            called: list[tuple[nn.Module, tuple[Any, ...]]] = []
            parts = list(network.values()) if isinstance(network, nn.ModuleDict) else [network]
            hooks = [part.register_forward_pre_hook(lambda part, given: called.append((part, given))) for part in parts]
            try:
                self.predicted(network)
                if not called:
                    raise RuntimeError("predict() does not call the network as a whole")
                with self._quietly(), torch.no_grad():
                    definition, _ = graph(*called[0])
            except RuntimeError as error:  # whatever the tracer cannot follow
                log.warning("log.graph: the network's graph cannot be drawn: %s", str(error).strip().splitlines()[0])
                return None
            finally:
                for hook in hooks:
                    hook.remove()
        return definition.SerializeToString()


# ---- values


def _value(field: Field, column: Any, place: int) -> Any:
    """One row's value of a column as `Rows.take` gives it."""
    if isinstance(field, Picture):
        one = replace(column, data=column.data[place : place + 1], sizes=column.sizes[place : place + 1])
        return one.decoded()[0].permute(1, 2, 0).numpy()  # (H, W, C)
    if isinstance(field, (Tokens, Labels, Boxes)):
        values, lengths = column
        start = int(lengths[:place].sum())
        return np.asarray(values[start : start + int(lengths[place])])
    return column[place] if not isinstance(field, ObjectMasks) else None


def _cell(field: Field, facts: Mapping[str, Any], value: Any) -> Cell:
    if isinstance(field, ClassMap):
        return COLOURS[value[:, :, 0]]
    if isinstance(field, Image):
        return _rgb(value.transpose(1, 2, 0))
    if isinstance(field, Picture):
        return _rgb(value)
    if isinstance(field, (Label, Labels)):
        return _named(np.asarray(value).tolist(), facts.get("classes") or [])
    if isinstance(field, Tokens):
        wanted = set(value[:WORDS].tolist())
        words = {number: word for word, number in (facts.get("vocabulary") or {}).items() if number in wanted}
        return _short(" ".join(words.get(number, str(number)) for number in value[:WORDS].tolist()))
    return _said(value)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 as (H, W, 3): of one channel, or of many, their mean."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    return np.repeat(pixels.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)


def _told(values: Any, field: Field | None, facts: Mapping[str, Any]) -> list[Any]:
    """One predicted column: pictures where it looks like them, else plain values; boxes stay lists."""
    if isinstance(values, Tensor) and values.ndim == 4 and values.shape[1] in (1, 3):
        pixels = values.detach().float().mul(1 if values.dtype == torch.uint8 else 255).clamp(0, 255).byte().cpu()
        return [_rgb(one.permute(1, 2, 0).numpy()) for one in pixels]
    maps = values if isinstance(values, (list, Tensor)) and isinstance(field, ClassMap) else []
    if len(maps):
        return [COLOURS[one.detach().cpu().numpy().astype(np.uint8)] for one in maps]
    rows = values.split() if isinstance(values, Ragged) else values
    told = [one.detach().cpu().tolist() if isinstance(one, Tensor) else one for one in rows]
    if isinstance(field, Boxes):
        return told
    classes = (facts.get("classes") or []) if isinstance(field, (Label, Labels)) else []
    return [_named(value, classes) if classes else _said(value) for value in told]


def _named(value: Any, classes: list[str]) -> str:
    numbers = value if isinstance(value, list) else [value]
    return ", ".join(classes[n] if isinstance(n, int) and 0 <= n < len(classes) else str(n) for n in numbers)


def _said(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return _short(", ".join(_said(one) for one in list(value)[:12]) + (" ..." if len(value) > 12 else ""))
    return _short(str(value))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WORDS else f"{text[:WORDS]}..."


def _table(columns: Mapping[str, list[str]], rows: int) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    body = [line([values[place] for values in columns.values()]) for place in range(rows)]
    return "\n".join([line(list(columns)), line(["---"] * len(columns)), *body])


# ---- drawing


def _fitted(pixels: np.ndarray, boxes: list[tuple[Any, str]]) -> Pillow.Image:
    """A picture at the size it is shown at, with boxes in it; small ones are enlarged by whole numbers."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    scale = max(1, SIDE // longest) if longest <= SIDE else SIDE / longest
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Pillow.Resampling.NEAREST if scale >= 1 else Pillow.Resampling.BILINEAR
    picture = Pillow.fromarray(pixels).resize(size, how)
    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in boxes:
        x, y = sorted((left * scale, right * scale)), sorted((top * scale, bottom * scale))
        draw.rectangle((x[0], y[0], x[1], y[1]), outline=colour)
    return picture


def _binned(tag: str, tensor: Tensor) -> tuple[str, np.ndarray, np.ndarray]:
    values = tensor.detach().float().cpu().numpy().ravel()
    counts, edges = np.histogram(values[np.isfinite(values)].astype(np.float64), BINS)
    return tag, counts.astype(np.float64), edges
