"""Checkpoints: what a training needs to go on to the bit, published atomically, checked when read.

`checkpoints/step-00001200/` holds model.safetensors, optimizer.safetensors, state.json and a manifest with sizes and
checksums; `best` and `last` are one-line files that name a step. The newest complete one wins. A training waits for
one copy of its tensors in memory; a thread writes them.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from annotated_types import Ge

from distributed import durable, snapshot
from distributed.background import Background
from distributed.divergence import failure
from distributed.snapshot import Snapshot
from tasks.errors import RunFailed, UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")  # the name of what is not published yet
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
log = logging.getLogger("whipray")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When checkpoints are written, and how many stay."""

    every: Annotated[int, Ge(1)] | None = None  # optimizer steps between two; none: after every epoch only
    keep: Annotated[int, Ge(1)] = 2  # newest ones that stay, beside the best
    background: bool = True  # written by a thread while training goes on


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


class Writer:
    """Writes the checkpoints of one run, one after the other. Belongs to rank 0, and is a context."""

    def __init__(self, run_directory: Path, task: str, keep: int, background: bool) -> None:
        self.run_directory, self.task, self.keep = run_directory, task, keep
        durable.make_folder(run_directory)
        self._snapshot = Snapshot()
        self._thread = Background("checkpoint", background)

    def save(
        self, step: int, best_step: int | None, model: dict[str, "Tensor"], optimizer: dict[str, "Tensor"],
        state: dict[str, Any], learned: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Takes a checkpoint: when it returns, the tensors may change; when `settled` names its step, it stands.

        Waits for the one before. Raises RunFailed where that, or without a thread this one, cannot be written; and
        where one of the tensors `learned` of the model is not finite: then the checkpoint before it stays the newest.
        """
        self._thread.wait()
        told = durable.to_json(state, indent=1).encode()
        self._snapshot.take({MODEL: model, OPTIMIZER: optimizer})
        self._thread.start(self._write, step, best_step, told, learned)

    def settled(self, wait: bool = False) -> list[int]:
        """Returns the steps whose checkpoints have come to stand since it was last asked, waiting for one under way.

        Raises RunFailed where one could not be written.
        """
        return self._thread.results(wait)

    def close(self) -> None:
        """Waits for what is under way, and ends the thread; raises as `settled` does."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            return  # who wants to end at once does not wait here; the thread ends with what is under way
        try:
            self.close()
        except (RunFailed, UserError) as error:
            if kind is None:
                raise
            log.warning("%s", error)  # what is on its way already is what ends the run

    def _write(self, step: int, best_step: int | None, state: bytes, learned: Collection[str]) -> int:
        """Publishes what the snapshot holds, points `last` and `best`, and removes what need not stay.

        A kill in between leaves pointers behind that `repair` sets right: what counts stands in the manifest.
        """
        target = folder_of(self.run_directory, step)
        odd = self._snapshot.first_odd(MODEL, learned)
        if odd:
            raise failure(f"the weights '{odd}' are not finite at step {step}", step)
        try:
            self.run_directory.stat()  # one that was taken away is not made anew
            with durable.publish(
                target, {"format": FORMAT, "step": step, "task": self.task, "best_step": best_step}
            ) as folder:
                for file in (MODEL, OPTIMIZER):
                    folder.add(file, *self._snapshot.pieces(file))
                folder.add(STATE, state)
            durable.verify(target, durable.read_manifest(target, (FORMAT,)), checksums=False)
            _point(self.run_directory, step, best_step)
            _prune(self.run_directory, self.keep, {step, best_step})
        except OSError as error:
            raise self._failed(target, error) from error
        return step

    def _failed(self, target: Path, error: OSError) -> RunFailed:
        """Never tried again: what the disk has refused once, it may only seem to take the second time."""
        file = PART.sub(r"\1", Path(error.filename).name) + " " if error.filename else ""
        whole = next((folder.name for folder in _newest_first(self.run_directory) if _is_intact(folder)), None)
        stands = f"{whole} stands" if whole else "there is no checkpoint yet"
        why = os.strerror(error.errno) if error.errno else str(error)
        failed = RunFailed(f"{target}: {file}cannot be written: {why}; {stands}")
        megabytes = max(1, round(self._snapshot.num_bytes / 1e6))
        remedy = f"make room there, a checkpoint takes {megabytes} MB" if error.errno in FULL else "look after the disk"
        failed.add_note(f"{remedy}; then the same command with the same --name goes on")
        return failed


def save(
    run_directory: Path, step: int, task: str, best_step: int | None, keep: int,
    model: dict[str, "Tensor"], optimizer: dict[str, "Tensor"], state: dict[str, Any],
) -> Path:  # fmt: skip
    """Publishes one checkpoint in this thread, and returns its folder; raises RunFailed where it cannot be written."""
    Writer(run_directory, task, keep, background=False).save(step, best_step, model, optimizer, state)
    return folder_of(run_directory, step)


def _prune(run_directory: Path, keep: int, spared: set[int | None]) -> None:
    """Removes all but the newest `keep` that are whole and the spared steps: damaged ones do not stand for others."""
    whole = 0
    for folder in _newest_first(run_directory):
        if whole < keep or _step_of(folder) in spared:
            whole += _is_intact(folder)
        else:
            durable.remove(folder)


def _is_intact(folder: Path) -> bool:
    """Whether a checkpoint's manifest is sound, and its files have their sizes: quick, their content is not read."""
    try:
        durable.verify(folder, durable.read_manifest(folder, (FORMAT,)), checksums=False)
    except (UserError, OSError):
        return False
    return True


def _point(run_directory: Path, last: int, best: int | None) -> None:
    """`last` and `best` are files of one line for people and for tools."""
    for name, step in (("last", last), ("best", best)):
        if step is not None and folder_of(run_directory, step).exists():
            durable.write(run_directory / "checkpoints" / name, f"{folder_of(run_directory, step).name}\n")


def repair(run_directory: Path, found: "Checkpoint | None") -> None:
    """Before a run goes on from `found`: removes what is newer and damaged, and what a kill has left half-made."""
    for litter in [*run_directory.glob(".*.part"), *run_directory.glob("checkpoints/.*.part")]:
        shutil.rmtree(litter) if litter.is_dir() and not litter.is_symlink() else litter.unlink()
    if found:
        for folder in _newest_first(run_directory):
            if _step_of(folder) > found.step:
                durable.remove(folder)
        _point(run_directory, found.step, found.best_step)


def read(folder: Path) -> Checkpoint:
    """Returns a checkpoint; raises UserError naming the file that is missing or damaged, Foreign as durable does."""
    try:
        manifest = durable.read_manifest(folder, (FORMAT,))
        durable.verify(folder, manifest)
        if folder.name != folder_of(folder, manifest["step"]).name:
            raise UserError(f"{folder}: is of step {manifest['step']}", "it was renamed, or another put in its place")
        return Checkpoint(
            step=manifest["step"],
            task=manifest["task"],
            best_step=manifest["best_step"],
            model=snapshot.read(folder / MODEL),
            optimizer=snapshot.read(folder / OPTIMIZER),
            state=json.loads((folder / STATE).read_bytes()),
            path=folder,
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: cannot be read: {error}", "it was damaged or tampered with") from error


def state(folder: Path) -> dict[str, Any]:
    """Returns the numbers of a checkpoint that has just been written, without its tensors."""
    return json.loads((folder / STATE).read_bytes())


def newest(run_directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest complete checkpoint, if there is one, and why newer ones were passed over.

    Raises Foreign for a newer one that is not damaged: it must not be passed over, and then replaced.
    """
    passed: list[str] = []
    for folder in _newest_first(run_directory):
        try:
            return read(folder), passed
        except durable.Foreign:
            raise
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
    there = [path for path in (run_directory / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    yield from sorted(there, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


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
            found[name] = tensor.detach()
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
