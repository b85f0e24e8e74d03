"""A run's network: built from a seed, placed on its device, wrapped for its ranks; or read back from a run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed import checkpoint, saved
from distributed.data.order import seed_of
from distributed.run import Run
from distributed.update import ONLY
from distributed.world import World
from tasks.errors import UserError
from tasks.task import Facts

BUILD_SEED = 1 << 40  # apart from every step's seed


@dataclass(frozen=True)
class Model:
    """The network as the task built it, and as the ranks train it."""

    plain: nn.Module
    wrapped: nn.Module
    lent: tuple[nn.Module, ...]  # frozen networks of other runs, that `load` gave: not ours to train or to save

    @classmethod
    def build(cls, run: Run, facts: Facts, world: World) -> "Model":
        """Raises UserError where the entries of a ModuleDict are not those that the task declares."""
        lent: list[nn.Module] = []

        def load(reference: str) -> tuple[nn.Module, Facts]:
            with torch.random.fork_rng():  # building another network must not shift the draws of this one
                network, its_facts = read(reference, run.runs, world)
            lent.append(network)
            return network, its_facts

        torch.manual_seed(seed_of(run.train.seed, BUILD_SEED))
        module = run.task.build(facts, load)
        _check_entries(module, run.task.entries)
        module.to(device=world.device, dtype=run.precision.stored)
        if isinstance(module, nn.ModuleDict):
            wrapped: nn.Module = nn.ModuleDict({name: world.wrap(part) for name, part in module.items()})
        else:
            wrapped = world.wrap(module)
        # One whose weights the task has set free again learns, and is ours.
        frozen = tuple(network for network in lent if not any(p.requires_grad for p in network.parameters()))
        return cls(module, wrapped, frozen)

    def learning(self) -> nn.Module:
        """Returns the network in training mode; those that are lent stay as they were judged."""
        self.wrapped.train()
        for network in self.lent:
            network.eval()
        return self.wrapped

    def _borrowed(self) -> tuple[str, ...]:
        """The prefixes of what is not saved."""
        return tuple(f"{n}." for n, part in self.plain.named_modules() if any(part is one for one in self.lent))

    def tensors(self) -> dict[str, Tensor]:
        return checkpoint.tensors_of(self.plain, self._borrowed())

    def restore(self, tensors: dict[str, Tensor], where: str) -> None:
        checkpoint.restore(self.plain, tensors, self._borrowed(), where)

    def share_buffers(self, world: World) -> None:
        """Gives all ranks the buffers of rank 0, such as running means, before anything is judged or saved."""
        world.share(list(self.plain.buffers()))


def _check_entries(module: nn.Module, declared: tuple[str, ...]) -> None:
    learning = {ONLY}
    if isinstance(module, nn.ModuleDict):
        learning = {name for name, part in module.items() if any(p.requires_grad for p in part.parameters())}
    if learning != (set(declared) or {ONLY}):
        raise UserError(
            f"the learning entries of build()'s network are {sorted(learning)}, the task declares {list(declared)}",
            f"write entries = {tuple(sorted(learning))} in the task's class",
        )


def read(reference: str, runs: Path, world: World, which: str = "best") -> tuple[nn.Module, Facts]:
    """Returns the frozen network of another run at one of its checkpoints, and its facts."""
    other = saved.find(reference, runs)
    model = Model.build(other.run, other.facts, World(device=world.device))
    chosen = checkpoint.chosen(other.directory, which)
    model.restore(chosen.model, str(chosen.path))
    return model.plain.eval().requires_grad_(False), other.facts
