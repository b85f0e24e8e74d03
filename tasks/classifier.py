"""What classifiers share: smoothed, focal and weighted losses, mixup and cutmix, as settings of every one of them."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from tasks import augment, losses
from tasks.errors import UserError
from tasks.fields import Image, Label, Number, Picture, Vector, Weight
from tasks.task import Batch, Draw, Facts, Load, Task

BETA = 0.999  # of the effective number of rows: the middle of what Cui et al. try
WEIGHTS = "class_weights"  # the buffer of the network that holds them


class Classifier(Task):
    """A task whose one target is a `Label`. Its author writes `network` instead of `build`.

    A row's loss is its cross entropy (`tasks.losses.cross_entropy`), in training as the settings shape it, in
    evaluation always the plain one: so that runs with other settings can be compared by it.

    Rows are mixed by the default `transform`; one that replaces it ends with `self.mixed(batch, draw)` in training.
    """

    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of a target that is spread over all classes; 0: none
    focal: Annotated[float, Ge(0)] = 0.0  # exponent that makes the loss of rows which are right already small; 0: none
    weighting: Literal["none", "balanced", "effective"] = "none"  # of classes: alike, by 1 / rows, 1 / effective rows
    effective_beta: Annotated[float, Gt(0), Lt(1)] | None = None  # of weighting=effective; none: 0.999
    class_weights: tuple[float, ...] = ()  # numbers of your own, one a class, instead of weighting
    mixup: Annotated[float, Ge(0)] = 0.0  # rows are averaged with others, a share of Beta(mixup, mixup); 0: never
    cutmix: Annotated[float, Ge(0)] = 0.0  # pictures get a piece of others, 1 - Beta(cutmix, cutmix) large; 0: never

    def __post_init__(self) -> None:
        """Raises UserError for settings that mean nothing together, or nothing for the task's columns."""
        if self.class_weights and self.weighting != "none":
            raise UserError(
                f"task.class_weights and task.weighting={self.weighting} both say what classes weigh", "set one of them"
            )
        if self.effective_beta is not None and self.weighting != "effective":
            raise UserError(
                f"'task.effective_beta' is not used: task.weighting is {self.weighting}", "task.weighting=effective"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.class_weights):
            raise UserError(
                f"task.class_weights={_listed(self.class_weights)}: a weight cannot be below 0",
                "the weights are relative: 1,1,2 makes the rows of the third class count twice",
            )
        if self.class_weights and (known := _declared(self._label()[1])):
            self._check_count(known)
        if self.mixup or self.cutmix:
            self._check_mixing()

    @property
    def partners(self) -> int:  # type: ignore[override]
        return 1 if self.mixup or self.cutmix else 0

    # ---- what an author writes

    def network(self, facts: Facts, load: Load) -> nn.Module:
        """Returns the network, from the inputs in the order of `fields` to scores (B, classes); as `Task.build`."""
        raise TypeError(f"{type(self).__name__} has no network: define network(self, facts, load)")

    # ---- what follows

    def build(self, facts: Facts, load: Load) -> nn.Module:
        """Returns the network, with the weights of the classes as a buffer that is in no checkpoint.

        Raises UserError for weights that do not fit the classes.
        """
        network = self.network(facts, load)
        if self._weighted:
            network.register_buffer(WEIGHTS, self._weights(facts), persistent=False)
        return network

    def transform(self, batch: Batch, draw: Draw, training: bool) -> Batch:
        """As `Task.transform`; then, in training, rows are mixed where the settings say so."""
        batch = super().transform(batch, draw, training)
        return self.mixed(batch, draw) if training else batch

    def mixed(self, batch: Batch, draw: Draw) -> Batch:
        """Returns a training batch whose rows are mixed with their partners, by mixup, cutmix, or one of the two by
        chance. The label becomes shares of classes, (B, classes) float32. Without these settings all stays as it is.
        """
        if not self.partners:
            return batch
        name, label = self._label()
        inputs = [one for one, field in self.fields.items() if not field.target]
        partner, targets = batch["partner"][:, 0], losses.shares(batch[name], len(_declared(label)))
        averaged: Batch = {}
        if self.mixup:
            share = augment.beta(draw, self.mixup)
            averaged = {one: augment.mix(batch[one], share, partner) for one in inputs}
            averaged[name] = augment.mix(targets, share, partner)
        if not self.cutmix:
            return batch | averaged
        [picture] = inputs
        pasted: Batch = {}
        pasted[picture], pasted[name] = augment.cutmix(batch[picture], targets, draw, self.cutmix, partner)
        if not self.mixup:
            return batch | pasted
        chosen = draw.chance(0.5)
        return batch | {one: _where(chosen, pasted[one], averaged[one]) for one in pasted}

    def row_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the loss of each row, (B,) float32 or float64; outside of training the plain cross entropy."""
        name, _ = self._label()
        scores, target = self._output(model, batch), batch[name]
        if not model.training:
            return losses.cross_entropy(scores, target)
        if self.partners and not target.is_floating_point():
            raise UserError(
                f"{type(self).__name__}.transform() leaves rows as they are, and task.mixup or task.cutmix is set",
                "end it with `return self.mixed(batch, draw) if training else batch`",
            )
        weights = self._found(model) if self._weighted else None
        return losses.cross_entropy(scores, target, self.smoothing, self.focal, weights)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The mean of `row_loss`."""
        is_shaped = self.smoothing or self.focal or self._weighted or self.partners
        if type(self).row_loss is Classifier.row_loss and not (is_shaped and model.training):
            return super().loss(model, batch)  # the same mean in one operation: 5 % of a step of a small MLP
        return {"cross_entropy": self.row_loss(model, batch).mean()}

    # ---- weights of classes

    @property
    def _weighted(self) -> bool:
        return bool(self.class_weights) or self.weighting != "none"

    def _weights(self, facts: Facts) -> Tensor:
        """Returns what each class weighs, (classes,) float32, so that the training rows weigh 1 in the mean.

        The mean over whatever rows a worker got would make the loss depend on the number of workers. A class without
        training rows weighs 0, unless its weight is given.
        """
        name, _ = self._label()
        names, counts = facts[name]["classes"], torch.tensor(facts[name]["counts"], dtype=torch.float64)
        self._check_count(names)
        if self.class_weights:
            weights = torch.tensor(self.class_weights, dtype=torch.float64)
        elif self.weighting == "balanced":
            weights = 1 / counts
        else:  # Cui et al., 2019, equation 2
            weights = 1 / (1 - torch.pow(self.effective_beta or BETA, counts))
        if not self.class_weights:
            weights = torch.where(counts > 0, weights, 0.0)
        mean = (weights * counts).sum() / counts.sum()
        if not mean > 0:
            raise UserError(
                f"task.class_weights={_listed(self.class_weights)}: no class that has rows weighs anything",
                f"the training rows of {', '.join(names)} are {_listed(facts[name]['counts'])}",
            )
        return (weights / mean).float()

    def _check_count(self, names: list[str]) -> None:
        if self.class_weights and len(self.class_weights) != len(names):
            raise UserError(
                f"task.class_weights={_listed(self.class_weights)}: {len(self.class_weights)} numbers "
                f"for {len(names)} classes",
                f"one a class, in this order: {', '.join(names)}",
            )

    def _found(self, model: nn.Module) -> Tensor:
        """The buffer, under whatever wraps the network: of all modules it is asked first, so the first is its own."""
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] == WEIGHTS:
                return buffer
        raise UserError(
            f"{type(self).__name__}.build() replaces what gives the network the weights of its classes",
            "name it network() instead, or set no task.weighting and no task.class_weights",
        )

    # ---- columns

    def _label(self) -> tuple[str, Label]:
        targets = {name: f for name, f in self.fields.items() if f.target and not isinstance(f, Weight)}
        [(name, field), *others] = targets.items() or [("", None)]
        if others or not isinstance(field, Label):
            raise TypeError(
                f"{type(self).__name__} is a Classifier, whose one target is a Label; its targets are "
                f"{sorted(targets) or 'none'}: derive it from Task instead"
            )
        return name, field

    def _check_mixing(self) -> None:
        asked = "task.mixup" if self.mixup else "task.cutmix"
        name, label = self._label()
        if not _declared(label):
            raise UserError(
                f"{asked} needs classes that are declared, and '{name}' learns its own from the rows",
                "write Label(names=...) or Label(classes=...) in the task",
            )
        inputs = {name: field for name, field in self.fields.items() if not field.target}
        is_decoded = type(self).transform is not Classifier.transform
        pictures = (Image, Picture) if is_decoded else Image
        for column, field in inputs.items():
            if not isinstance(field, (pictures, Vector, Number)):  # type: ignore[arg-type]
                hint = "decode it to one size in transform()" if isinstance(field, Picture) else f"leave out {asked}"
                raise UserError(f"{asked} cannot mix rows of '{column}', which is {type(field).__name__}", hint)
        if self.cutmix and not (len(inputs) == 1 and isinstance(next(iter(inputs.values())), pictures)):
            raise UserError(
                f"task.cutmix is for tasks whose one input is a picture; these are {', '.join(inputs)}",
                "task.mixup mixes numbers too",
            )


def _declared(label: Label) -> list[str]:
    return list(label.names) or [str(number) for number in range(label.classes)]


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (one.ndim - 1)), one, other)


def _listed(numbers: tuple[float, ...] | list[int]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
