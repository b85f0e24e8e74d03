"""`export`: a run's network in a format of others, written only where it says what the network says on real rows."""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from distributed import checkpoint, durable
from distributed.data import planned
from distributed.data.store import Store
from distributed.export.programs import PROGRAMS
from distributed.model import Model
from distributed.run import Run
from distributed.saved import Saved
from distributed.world import World
from tasks.errors import RunFailed, UserError

Format = Literal["torch", "torchscript", "onnx"]
ROWS = 32  # real rows on which both are compared
TOLERANCE = 1e-4  # largest difference, relative to the largest output; float32 kernels of two programs round apart


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what it takes and gives."""

    path: Path
    to: Format
    step: int  # of the checkpoint
    difference: float  # largest one of any output on the rows compared, relative to the largest output
    rows: int  # that were compared
    inputs: dict[str, dict[str, Any]]  # name -> dtype, shape; a name in a shape may be any size
    outputs: list[dict[str, Any]]
    bytes: int


def export(found: Saved, store_path: Path, to: Format, path: Path | None = None, which: str = "best") -> Exported:
    """Writes the network of a checkpoint beside the run, or to `path`, with a JSON file that describes it.

    What goes in is what the task's transform makes of rows (`Task.network_inputs`), in evaluation, on the CPU. Raises
    UserError for a task whose network cannot be called so and for a package that is missing, RunFailed where the
    exported one says something else than the network, or cannot be written. What stood at `path` stays until then.
    """
    run, store, world = found.run, Store(store_path, dict(found.run.task.fields)), World()
    run = dataclasses.replace(run, precision=dataclasses.replace(run.precision, compile="no", recompute=()))
    program = PROGRAMS[to]
    program.check()
    target = _writable(path or found.directory / "export" / f"model{program.suffix}")
    chosen = checkpoint.chosen(found.directory, which)
    model = Model.build(run, found.facts, world)
    model.restore(chosen.model, str(chosen.path))
    network = model.plain.eval().requires_grad_(False)
    if isinstance(network, nn.ModuleDict):
        raise UserError(f"{run.name}: its network is {len(network)} networks: {', '.join(network)}",
                        "exporting one of several is not there yet")  # fmt: skip
    batches = _batches(run, store, world)
    sizes, names = _free_sizes(batches), list(batches[0])
    written = program.write(copy.deepcopy(network), batches[-1], sizes)
    difference, rows, outputs = _compared(network, program.run(written, names), batches)
    if not difference <= TOLERANCE:
        raise RunFailed(
            f"{found.directory}: the exported network differs from the one trained by {difference:.2g} of the largest "
            f"output, {TOLERANCE:.0e} is the most"
        )
    told = Exported(target, to, chosen.step, difference, rows, _described(batches[0], sizes), outputs, len(written))
    described = {**dataclasses.asdict(told), "path": target.name, "task": run.name, "facts": found.facts}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.write(target, written)
        durable.write_json(target.with_suffix(".json"), described)
    except OSError as error:
        raise RunFailed(f"{target}: cannot be written: {error.strerror}") from error
    return told


def _writable(path: Path) -> Path:
    """Returns a file's path; raises UserError, before anything is worked out, where it cannot be written."""
    path = path.absolute()
    if path.is_dir():
        raise UserError(f"{path}: is a folder", f"name a file: {path / 'model.pt2'}")
    if path.suffix == ".json":
        raise UserError(f"{path}: the description of the network is written there", "give the file another ending")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: {above} is no folder that you may write to", "name another file")
    return path


def _batches(run: Run, store: Store, world: World) -> list[dict[str, Tensor]]:
    """The inputs of the network for real rows, in portions of different sizes: of which the first has one row."""
    split = next((name for name in ("validation", "train") if store.rows(name, None)), "train")
    loader = planned.loader(store, split, run.data, run.train.seed, run.transform, world, training=False)
    found: list[dict[str, Tensor]] = []
    for size in (1, 3, ROWS):
        batch = next(iter(loader.in_order(size)))
        inputs = run.task.network_inputs(batch)
        if not inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
            raise UserError(
                f"{run.name}: its network does not take tensors with one entry a row",
                "define network_inputs(self, batch) in the task: name -> tensor, in the order of forward",
            )
        found.append(inputs)
    return found


def _free_sizes(batches: list[dict[str, Tensor]]) -> dict[str, dict[int, str]]:
    """The dimensions of each input that differ from portion to portion, by name: the rows of all, and the length."""
    free: dict[str, dict[int, str]] = {}
    for name, first in batches[0].items():
        differing = [
            axis for axis in range(first.ndim) if len({inputs[name].shape[axis] for inputs in batches}) > 1
        ]  # fmt: skip
        free[name] = {axis: "rows" if axis == 0 else f"{name}_{axis}" for axis in {0, *differing}}
    return free


def _compared(network: nn.Module, other: Any, batches: Iterable[dict[str, Tensor]]) -> tuple[float, int, list]:
    """Returns the largest relative difference, over how many rows, and what the outputs are."""
    worst, rows, outputs = 0.0, 0, []
    for inputs in batches:
        with torch.no_grad():
            wanted = _flat(network(*inputs.values()))
        try:
            got = _flat(other(*inputs.values()))
        except Exception as error:  # whatever a runtime says
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs.values())
            words = str(error).strip().splitlines()
            raise RunFailed(
                f"the exported network cannot be run on inputs of {shapes}: {words[0] if words else error!r}"
            ) from error
        if len(wanted) != len(got):
            raise RunFailed(f"the exported network has {len(got)} outputs, the one trained {len(wanted)}")
        for one, two in zip(wanted, got, strict=True):
            scale = max(float(one.double().abs().max()) if one.numel() else 0.0, 1e-6)
            apart = float((one.double() - two.double()).abs().max()) if one.numel() else 0.0
            worst = max(worst, apart / scale) if math.isfinite(apart) else math.inf
        rows += len(next(iter(inputs.values())))
        outputs = [{"dtype": _kind(one), "shape": ["rows", *one.shape[1:]]} for one in wanted]
    return worst, rows, outputs


def _flat(told: Any) -> list[Tensor]:
    return [one for one in _pytree.tree_leaves(told) if isinstance(one, Tensor)]


def _described(inputs: dict[str, Tensor], free: dict[str, dict[int, str]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": _kind(value), "shape": [free[name].get(axis, size) for axis, size in enumerate(value.shape)]}
        for name, value in inputs.items()
    }


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
