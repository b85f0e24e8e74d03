"""A run's network: built from a seed, placed on its device, wrapped for its ranks; or read back from a run."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from distributed import checkpoint, freezing, saved, weights
from distributed.data.order import seed_of
from distributed.run import Run
from distributed.sync_norm import synchronised
from distributed.update import ONLY
from distributed.world import World
from tasks.errors import UserError, did_you_mean
from tasks.task import Facts

BUILD_SEED = 1 << 40  # apart from every step's seed


@dataclass(frozen=True)
class Model:
    """The network as the task built it, and as the ranks train it."""

    plain: nn.Module
    wrapped: nn.Module
    lent: tuple[nn.Module, ...]  # frozen networks of other runs, that `load` gave: not ours to train or to save
    frozen: frozenset[str] = frozenset()  # parameters that train.freeze keeps from learning, for now

    @classmethod
    def build(cls, run: Run, facts: Facts, world: World, epoch: int = 0) -> "Model":
        """Returns the network as it learns in an epoch.

        Raises UserError where the entries of a ModuleDict are not those that the task declares, and for settings that
        name a part which is not there.
        """
        lent: list[nn.Module] = []

        def load(reference: str) -> tuple[nn.Module, Facts]:
            with torch.random.fork_rng():  # building another network must not shift the draws of this one
                network, its_facts = read(reference, run.runs, world)
            lent.append(network)
            return network, its_facts

        world.seed(seed_of(run.train.seed, BUILD_SEED))
        module = run.task.build(facts, load)
        _check_entries(module, run.task.entries)
        module.to(device=world.device, dtype=run.precision.stored)
        if run.precision.channels_last:
            module.to(memory_format=torch.channels_last)
        if run.precision.sync_norm and world.size > 1:
            module = synchronised(module, world.device)
        _recompute(module, run.precision.recompute)
        # One whose weights the task has set free again learns, and is ours.
        still = tuple(network for network in lent if not any(p.requires_grad for p in network.parameters()))
        return cls(module, module, still)._wrapped(run, world, epoch)

    def _wrapped(self, run: Run, world: World, epoch: int) -> "Model":
        """Freezes what does not learn in an epoch, and wraps the rest for the ranks and the compiler."""
        names = self._names()
        frozen = freezing.frozen(names, run.train.freeze, run.train.unfreeze, epoch)
        for name, parameter in names.items():
            if name in frozen or name in self.frozen:
                parameter.requires_grad_(name not in frozen)
        wrap = functools.partial(_wrap, run, world)
        if isinstance(self.plain, nn.ModuleDict):
            wrapped: nn.Module = nn.ModuleDict({name: wrap(part) for name, part in self.plain.items()})
        else:
            wrapped = wrap(self.plain)
        made = replace(self, wrapped=wrapped, frozen=frozen)
        made._train()
        return made

    def _names(self) -> dict[str, nn.Parameter]:
        """The parameters that are not lent."""
        lent = {id(parameter) for network in self.lent for parameter in network.parameters()}
        return {name: p for name, p in self.plain.named_parameters() if id(p) not in lent}

    def thawed(self, run: Run, world: World, epoch: int) -> "Model":
        """Returns the model as it learns in an epoch: itself, where nothing is set free then."""
        if not run.train.unfreeze:
            return self
        frozen = freezing.frozen(self._names(), run.train.freeze, run.train.unfreeze, epoch)
        return self if frozen == self.frozen else self._wrapped(run, world, epoch)

    def learning(self) -> nn.Module:
        """Returns the network in training mode; what is lent or frozen stays as it was judged."""
        if not self.plain.training:  # somebody has judged it; in every step it would take longer than a small layer
            self._train()
        return self.wrapped

    def _train(self) -> None:
        self.plain.train()  # where there are several entries, its root is not that of what is wrapped
        self.wrapped.train()
        for network in self.lent:
            network.eval()
        for layer in self._still():
            layer.eval()

    def _still(self) -> Iterable[nn.Module]:
        """The layers whose own parameters are all frozen: a normalisation among them keeps its statistics.

        What consists of layers is none itself: a frozen parameter of the root leaves all others learning.
        """
        if not self.frozen:
            return
        for path, layer in self.plain.named_modules():
            own = [f"{path}.{name}".lstrip(".") for name, _ in layer.named_parameters(recurse=False)]
            if own and self.frozen.issuperset(own) and not any(layer.children()):
                yield layer

    @property
    def borrowed(self) -> tuple[str, ...]:
        """The prefixes of what is not saved."""
        return tuple(f"{n}." for n, part in self.plain.named_modules() if any(part is one for one in self.lent))

    def learned(self) -> frozenset[str]:
        """The names of the parameters that learn."""
        return frozenset(name for name, parameter in self.plain.named_parameters() if parameter.requires_grad)

    def live(self) -> dict[str, Tensor]:
        """The very parameters and buffers that `tensors` tells of."""
        everything = self.plain.state_dict(keep_vars=True)
        return {name: everything[name] for name in self.tensors()}

    def tensors(self) -> dict[str, Tensor]:
        return checkpoint.tensors_of(self.plain, self.borrowed)

    def restore(self, tensors: dict[str, Tensor], where: str) -> None:
        checkpoint.restore(self.plain, tensors, self.borrowed, where)

    def buffers(self) -> list[Tensor]:
        """Returns a copy of all buffers, such as running means."""
        return [buffer.detach().clone() for buffer in self.plain.buffers()]

    @torch.no_grad()
    def put_back(self, buffers: list[Tensor]) -> None:
        """Lets the buffers hold what `buffers` told."""
        for buffer, before in zip(self.plain.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def share_buffers(self, world: World) -> None:
        """Gives all ranks the buffers of rank 0, such as running means, before anything is judged or saved."""
        world.share(list(self.plain.buffers()))


def _wrap(run: Run, world: World, part: nn.Module) -> nn.Module:
    if run.precision.compile == "no":
        return world.wrap(part, run.parallel)

    wrapped = world.wrap(part, run.parallel)
    mode = None if run.precision.compile == "default" else run.precision.compile
    wrapped.compile(mode=mode)  # in its place: names and checkpoints stay as they are
    return wrapped


def _recompute(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Lets the named parts forget their activations and make them again in backward (Chen et al., 2016)."""
    names = {name: part for name, part in module.named_modules() if name}
    for pattern in patterns:
        found = [part for name, part in names.items() if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"precision.recompute={pattern}: the network has no such part", did_you_mean(pattern, names)
            )
        for part in found:
            # The draws of dropout are made again too: torch keeps the generator's state for it.
            contexts = functools.partial(_counting_once, part)
            part.forward = functools.partial(recomputed, part.forward, use_reentrant=False, context_fn=contexts)


def _counting_once(part: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """The contexts of the first and of the second computation: in the second, statistics have seen the rows already."""
    return contextlib.nullcontext(), _not_tracking(part)


@contextlib.contextmanager
def _not_tracking(part: nn.Module) -> Iterator[None]:
    tracking = [one for one in part.modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
    momenta = [layer.momentum for layer in tracking]
    counts = [layer.num_batches_tracked.clone() for layer in tracking if layer.num_batches_tracked is not None]
    for layer in tracking:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(tracking, momenta, strict=True):
            layer.momentum = momentum
        counted = [layer.num_batches_tracked for layer in tracking if layer.num_batches_tracked is not None]
        for layer_count, count in zip(counted, counts, strict=True):
            layer_count.copy_(count)


def _check_entries(module: nn.Module, declared: tuple[str, ...]) -> None:
    learning = {ONLY}
    if isinstance(module, nn.ModuleDict):
        learning = {name for name, part in module.items() if any(p.requires_grad for p in part.parameters())}
    if learning != (set(declared) or {ONLY}):
        raise UserError(
            f"the learning entries of build()'s network are {sorted(learning)}, the task declares {list(declared)}",
            f"write entries = {tuple(sorted(learning))} in the task's class",
        )
    if isinstance(module, nn.ModuleDict):
        _refuse_shared(module)


def _refuse_shared(module: nn.ModuleDict) -> None:
    """A parameter of two entries would be stepped by two optimizers, each with the gradients of both losses."""
    owners: dict[Tensor, str] = {}
    for entry, part in module.items():
        for name, parameter in part.named_parameters():
            other = owners.setdefault(parameter, f"{entry}.{name}")
            if parameter.requires_grad and other.partition(".")[0] != entry:
                raise UserError(
                    f"'{other}' and '{entry}.{name}' of build()'s network are one parameter, and learn in two entries",
                    "keep it in one entry, and hand its output to the other",
                )


def read(reference: str, runs: Path, world: World, which: str = "best") -> tuple[nn.Module, Facts]:
    """Returns the frozen network of another run at one of its checkpoints, and its facts.

    `torchvision/NAME` is a network with its pretrained weights, and has no facts. Raises UserError for a file: it has
    weights and no network.
    """
    if weights.is_network(reference):
        return weights.network(reference).to(world.device).eval().requires_grad_(False), {}
    weights.refuse_file(reference)
    other = saved.find(reference, runs)
    model = Model.build(other.run, other.facts, World(device=world.device))
    chosen = checkpoint.chosen(other.directory, which)
    model.restore(chosen.model, str(chosen.path))
    return model.plain.eval().requires_grad_(False), other.facts
