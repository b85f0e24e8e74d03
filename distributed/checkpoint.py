"""Checkpoints: what a training needs to go on to the bit, published atomically, checked when read.

`checkpoints/step-00001200/` holds model.safetensors, optimizer.safetensors, state.json and a manifest with sizes and
checksums; `best` and `last` are one-line files that name a step. The newest complete one wins.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from distributed import durable
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When checkpoints are written, and how many stay."""

    every: Annotated[int, Ge(1)] | None = None  # optimizer steps between two; none: after every epoch only
    keep: Annotated[int, Ge(1)] = 2  # newest ones that stay, beside the best


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was read and found whole."""

    step: int
    task: str  # as a user writes it
    best_step: int | None  # of the run so far
    model: dict[str, "Tensor"]
    optimizer: dict[str, "Tensor"]
    state: dict[str, Any]
    path: Path


def folder_of(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step-{step:08d}"


def save(
    run_directory: Path, step: int, task: str, best_step: int | None, keep: int,
    model: dict[str, "Tensor"], optimizer: dict[str, "Tensor"], state: dict[str, Any],
) -> Path:  # fmt: skip
    """Publishes one checkpoint, points `last` and `best`, and removes all but the newest `keep` and the best.

    A kill in between leaves pointers behind that `repair` sets right: what counts stands in the manifest.
    """
    from safetensors.torch import save as to_bytes

    target = folder_of(run_directory, step)
    manifest = {"format": FORMAT, "step": step, "task": task, "best_step": best_step}
    with durable.publish(target, manifest) as folder:
        folder.add("model.safetensors", to_bytes(model))
        folder.add("optimizer.safetensors", to_bytes(optimizer))
        folder.add("state.json", durable.to_json(state, indent=1).encode())
    _point(run_directory, step, best_step)
    spared = {folder_of(run_directory, spare) for spare in (step, best_step) if spare is not None}
    for old in list(_newest_first(run_directory))[keep:]:
        if old not in spared:
            shutil.rmtree(old)
    return target


def _point(run_directory: Path, last: int, best: int | None) -> None:
    """`last` and `best` are files of one line for people and for tools."""
    for name, step in (("last", last), ("best", best)):
        if step is not None and folder_of(run_directory, step).exists():
            durable.write(run_directory / "checkpoints" / name, f"{folder_of(run_directory, step).name}\n")


def repair(run_directory: Path, found: "Checkpoint | None") -> None:
    """Before a run goes on from `found`: removes what is newer and damaged, and what a kill has left half-made."""
    for litter in [*run_directory.glob(".*.part"), *run_directory.glob("checkpoints/.*.part")]:
        shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
    if found:
        for folder in _newest_first(run_directory):
            if folder.name > found.path.name:
                shutil.rmtree(folder)
        _point(run_directory, found.step, found.best_step)


def read(folder: Path) -> Checkpoint:
    """Returns a checkpoint; raises UserError naming the file that is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        manifest = durable.read_manifest(folder, (FORMAT,))
        durable.verify(folder, manifest)
        return Checkpoint(
            step=manifest["step"],
            task=manifest["task"],
            best_step=manifest["best_step"],
            model=from_bytes((folder / "model.safetensors").read_bytes()),
            optimizer=from_bytes((folder / "optimizer.safetensors").read_bytes()),
            state=json.loads((folder / "state.json").read_bytes()),
            path=folder,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read: {error}", "it was damaged or tampered with") from error


def state(folder: Path) -> dict[str, Any]:
    """Returns the numbers of a checkpoint that has just been written, without its tensors."""
    return json.loads((folder / "state.json").read_bytes())


def newest(run_directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest complete checkpoint, if there is one, and why newer ones were passed over."""
    passed: list[str] = []
    for folder in _newest_first(run_directory):
        try:
            return read(folder), passed
        except UserError as error:
            passed.append(error.message)
    return None, passed


def chosen(run_directory: Path, which: str = "best") -> Checkpoint:
    """Returns the checkpoint called `best`, `last` or by a step number; best falls back to last where none is best.

    Raises UserError where it is missing or damaged, naming what else there is.
    """
    folders = list(_newest_first(run_directory))
    if which in ("best", "last"):
        named = _named(run_directory, which) or _named(run_directory, "last")
        wanted = named or (folders[0] if folders else None)
    else:
        wanted = folder_of(run_directory, int(which)) if which.isdigit() else run_directory / "checkpoints" / which
    there = [folder.name for folder in folders]
    if wanted is None or not wanted.exists():
        raise UserError(f"{run_directory}: no checkpoint '{wanted.name if wanted else which}'",
                        did_you_mean(which, there) or "train it first: whipray train")  # fmt: skip
    try:
        return read(wanted)
    except UserError as error:
        others = ", ".join(name for name in there if name != wanted.name)
        hint = f"other checkpoints of this run: {others} (--checkpoint STEP)" if others else error.hint
        raise UserError(error.message, hint) from error


def _newest_first(run_directory: Path) -> Iterator[Path]:
    yield from sorted((run_directory / "checkpoints").glob("step-*"), reverse=True)


def _named(run_directory: Path, which: str) -> Path | None:
    with contextlib.suppress(OSError):
        name = (run_directory / "checkpoints" / which).read_text().strip()
        if name.startswith("step-") and name[5:].isdigit():
            return run_directory / "checkpoints" / name
    return None


# ---- between modules and named tensors


def tensors_of(model: "nn.Module", leave_out: tuple[str, ...] = ()) -> dict[str, "Tensor"]:
    """Returns parameters and buffers by name, tied ones once, without those below the modules `leave_out`."""
    seen: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(leave_out) and leave_out:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            found[name] = tensor.detach().contiguous()
    return found


def restore(model: "nn.Module", tensors: dict[str, "Tensor"], leave_out: tuple[str, ...], where: str) -> None:
    """Loads what `tensors_of` gave; raises UserError naming the first tensor that does not fit the model."""
    wanted = tensors_of(model, leave_out)
    for name, tensor in wanted.items():
        if name not in tensors:
            raise UserError(f"{where}: has no tensor '{name}' that this model needs",
                            "it is of another task or other settings; " + did_you_mean(name, tensors))  # fmt: skip
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"{where}: '{name}' has shape {tuple(tensors[name].shape)}, this model needs {tuple(tensor.shape)}",
                "it was trained with another number of classes or other task.* settings",
            )
    stray = sorted(set(tensors) - set(wanted))
    if stray:
        raise UserError(f"{where}: holds '{stray[0]}', which this model does not have",
                        "it is of another task or other task.* settings")  # fmt: skip
    import torch

    with torch.no_grad():
        for name, tensor in wanted.items():
            model_tensor = model.get_parameter(name) if _is_parameter(model, name) else model.get_buffer(name)
            model_tensor.copy_(tensors[name].to(tensor.dtype))


def _is_parameter(model: "nn.Module", name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters
