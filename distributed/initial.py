"""Weights to begin with: those of a run, of a file, or of torchvision, as far as they fit by name and shape.

Where they come from may be another task with another head: what fits is taken, the rest is as the task built it, and
`Initial` says of every tensor which of the two it is. No torch here before anything is loaded.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import durable, saved, weights
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distributed.world import World

REPORT = "initial.json"
WRAPPERS = {"module", "_orig_mod"}  # names that DistributedDataParallel and torch.compile put in between
SHOWN = 4  # tensors that one line names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Initial:
    """What became of the tensors of a source and of a network."""

    source: str
    loaded: dict[str, str]  # name in the source -> name in the network
    skipped: dict[str, str]  # name in the source -> why it was not taken
    new: dict[str, Shape]  # name in the network -> shape, of what keeps the values that the task gave it
    kept: tuple[str, ...]  # buffers that describe the network's own data, such as Standardise's mean

    def __str__(self) -> str:
        taken = len(set(self.loaded.values()))
        new = [f"{name} {shape}" for name, shape in self.new.items()]
        return (
            f"initial weights: {taken} of {taken + len(new)} tensors from {self.source}"
            + _some("; new: ", new)
            + _some("; not taken: ", [f"{name} ({why})" for name, why in self.skipped.items()])
        )

    def write(self, directory: Path) -> None:
        """Leaves the whole report in a run directory, and its line in log.txt."""
        told = {
            "line": str(self), "source": self.source, "loaded": self.loaded, "skipped": self.skipped,
            "new": self.new, "kept": self.kept,
        }  # fmt: skip
        durable.write_json(directory / REPORT, told)
        saved.note(directory, str(self))


def line(directory: Path) -> str | None:
    """Returns the line that a run's report has for people; None where it did not begin from other weights."""
    try:
        return json.loads((directory / REPORT).read_bytes())["line"]
    except (OSError, ValueError):
        return None


def _some(heading: str, words: list[str]) -> str:
    more = f", and {len(words) - SHOWN} more ({REPORT})" if len(words) > SHOWN else ""
    return heading + ", ".join(words[:SHOWN]) + more if words else ""


# ---- into a network


def begin(reference: str, network: "nn.Module", runs: Path, world: "World", borrowed: tuple[str, ...] = ()) -> Initial:
    """Loads on rank 0 and shares with all ranks, so that all begin alike and a file need be in one place only.

    A collective; raises what `load` raises, on every rank.
    """
    outcome: Initial | UserError | None = None
    if world.rank == 0:
        try:
            outcome = load(reference, network, runs, borrowed)
        except UserError as error:
            outcome = error
    outcome = world.gather(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, Initial), "rank 0 has one or the other"
    world.share([tensor.detach() for tensor in _tensors(network, borrowed).values()])
    return outcome


def load(reference: str, network: "nn.Module", runs: Path, borrowed: tuple[str, ...] = ()) -> Initial:
    """Copies into a network what fits it by name and shape, cast to its type of numbers; returns what became of all.

    The part that fits may stand elsewhere: one pair of prefixes (`backbone.` there, none here) is exchanged, the one
    by which most tensors fit; names that are the same fit anyway. Of buffers only the running statistics of
    normalisation are weights: all others, such as the mean and deviation in Standardise, are facts of the network's
    own data and stay. `borrowed` are prefixes of what is not the network's to learn.

    Raises UserError where nothing fits, where it fits in several places alike, and for weights that are not finite.
    """
    import torch

    theirs = weights.read(reference, runs)
    ours = _tensors(network, borrowed)
    learned = {name for name, tensor in ours.items() if _is_weight(network, name, tensor)}
    plain = {name: _unwrapped(name, ours) for name in theirs}
    exchanged = _prefixes({plain[name]: tuple(tensor.shape) for name, tensor in theirs.items()}, ours, reference)
    first = {}  # tensor -> its first name: tied ones have several
    for name, tensor in ours.items():
        first.setdefault(id(tensor), name)

    loaded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    kept: list[str] = []
    values: dict[str, Tensor] = {}  # by name in the network
    for name, there in sorted(theirs.items()):
        target = _place(plain[name], tuple(there.shape), exchanged, ours)
        if target is None:
            skipped[name] = "not in this model"
            continue
        here, target = ours[target], first[id(ours[target])]
        if target not in learned:
            kept.append(target)
        elif here.shape != there.shape:
            skipped[name] = f"{tuple(there.shape)} there, {tuple(here.shape)} here"
        elif here.is_floating_point() != there.is_floating_point() or there.layout != torch.strided:
            skipped[name] = f"{there.dtype} there, {here.dtype} here"
        elif target in values and not torch.equal(values[target], there):
            skipped[name] = f"'{target}' is one tensor here, and has its values from another"
        else:
            values.setdefault(target, there)
            loaded[name] = target
    if not any(isinstance(ours[name], torch.nn.Parameter) for name in values):
        raise _nothing_fits(reference, theirs, {name: ours[name] for name in ours if name in learned})
    cast = {name: value.to(ours[name].dtype) for name, value in values.items()}
    for name, value in cast.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{reference}: '{name}' holds values that are not finite", "take another checkpoint")
    with torch.no_grad():
        for name, value in cast.items():
            ours[name].copy_(value)
    targets = {first[id(ours[name])] for name in learned}
    new = {name: tuple(ours[name].shape) for name in ours if name in targets - values.keys()}
    return Initial(reference, loaded, skipped, new, tuple(dict.fromkeys(kept)))


def _tensors(network: "nn.Module", borrowed: tuple[str, ...]) -> "dict[str, Tensor]":
    """Parameters and saved buffers by name, tied ones by each of their names."""
    import torch

    found = network.state_dict(keep_vars=True)
    return {n: t for n, t in found.items() if isinstance(t, torch.Tensor) and not n.startswith(borrowed or ("\0",))}


def _is_weight(network: "nn.Module", name: str, tensor: "Tensor") -> bool:
    """Whether it is learned: a parameter, or a running statistic of a normalisation, frozen or not."""
    from torch import nn

    owner = network.get_submodule(name.rpartition(".")[0])
    return isinstance(tensor, nn.Parameter) or "running_var" in owner._buffers


def _unwrapped(name: str, ours: Mapping[str, Any]) -> str:
    """A name without what wrappers have added to it."""
    if name in ours:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """("", "a.b"), ("a.", "b") of "a.b"."""
    parts = name.split(".")
    for at in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:at]), ".".join(parts[at:])


def _prefixes(theirs: Mapping[str, Shape], ours: "Mapping[str, Tensor]", reference: str) -> tuple[str, str]:
    """The prefix there and the prefix here by whose exchange most tensors fit; none where the names are the same."""
    here: dict[tuple[str, Shape], list[str]] = {}
    for name, tensor in ours.items():
        for prefix, tail in _splits(name):
            here.setdefault((tail, tuple(tensor.shape)), []).append(prefix)
    fitting: Counter[tuple[str, str]] = Counter()
    for name, shape in theirs.items():
        for prefix, tail in _splits(name) if shape else ():  # a counter of batches fits every other
            for other in here.get((tail, shape), ()):
                # That both end with "weight" says nothing, unless it is the whole name of one of them.
                if "." in tail or not prefix or not other:
                    fitting[prefix, other] += 1
    most = max(fitting.values(), default=0)
    best = [pair for pair, count in fitting.items() if count == most]
    if not best or ("", "") in best:
        return "", ""
    length = min(there.count(".") + other.count(".") for there, other in best)
    shortest = [pair for pair in best if pair[0].count(".") + pair[1].count(".") == length]
    if len(shortest) > 1:
        places = ", ".join(f"'{there}*' into '{other}*'" for there, other in shortest[:3])
        raise UserError(f"{reference}: its tensors fit in several places alike: {places}",
                        "give a file that holds the one part, under the names that the model has for it")  # fmt: skip
    return shortest[0]


def _place(name: str, shape: Shape, exchanged: tuple[str, str], ours: "Mapping[str, Tensor]") -> str | None:
    """Our name of a tensor of theirs: by the exchanged prefix, else the same; of two, the one whose shape fits."""
    there, here = exchanged
    moved = here + name.removeprefix(there) if name.startswith(there) else name
    candidates = [one for one in (moved, name) if one in ours]
    fitting = [one for one in candidates if tuple(ours[one].shape) == shape]
    return next(iter([*fitting, *candidates]), None)


def _nothing_fits(reference: str, theirs: "Mapping[str, Tensor]", ours: "Mapping[str, Tensor]") -> UserError:
    def listed(tensors: "Mapping[str, Tensor]") -> str:
        return ", ".join(f"'{name}' {tuple(t.shape)}" for name, t in list(tensors.items())[:SHOWN])

    near = did_you_mean(next(iter(theirs)), ours) if theirs else ""
    return UserError(
        f"{reference}: no tensor fits this model by name and shape: it holds {listed(theirs)} ...; "
        f"the model has {listed(ours)} ...",
        f"it is of another network, or of other task.* settings{'; ' + near if near else ''}",
    )
