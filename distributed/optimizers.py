"""The optimizers by name, each with the settings that it has; any other class by `module:Class`."""

import functools
import importlib
import inspect
import operator
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has."""

    name: str = "adamw"  # sgd, adam, adamw, rmsprop, adagrad, adadelta, or any class as module:Class
    lr: Annotated[float, Gt(0)] = 1e-3  # learning rate that the schedule scales
    every: Annotated[int, Ge(1)] = 1  # steps only every so many batches, as for a critic's partner


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    weight_decay: NotNegative = 0.0  # L2 penalty
    momentum: Share = 0.0  # share of the last step that is kept
    nesterov: bool = False  # look ahead along the momentum (Nesterov, 1983)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    weight_decay: NotNegative = 0.0  # L2 penalty
    beta1: Share = 0.9  # decay of the mean gradient
    beta2: Share = 0.999  # decay of the mean squared gradient
    eps: Annotated[float, Gt(0)] = 1e-8  # keeps the division finite


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    weight_decay: NotNegative = 0.01  # decoupled decay (Loshchilov and Hutter, 2019)


@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    weight_decay: NotNegative = 0.0  # L2 penalty
    momentum: Share = 0.0  # share of the last step that is kept
    alpha: Share = 0.99  # decay of the mean squared gradient
    eps: Annotated[float, Gt(0)] = 1e-8  # keeps the division finite


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    weight_decay: NotNegative = 0.0  # L2 penalty
    lr_decay: NotNegative = 0.0  # how fast the learning rate falls by itself
    eps: Annotated[float, Gt(0)] = 1e-10  # keeps the division finite


@dataclass(frozen=True, kw_only=True)
class Adadelta(Optimizer):
    weight_decay: NotNegative = 0.0  # L2 penalty
    rho: Share = 0.9  # decay of the mean squared gradient
    eps: Annotated[float, Gt(0)] = 1e-6  # keeps the division finite


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop, "adagrad": Adagrad, "adadelta": Adadelta,
}  # fmt: skip
_CLASSES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
}
_FUSED = {"sgd", "adam", "adamw", "adagrad"}  # one kernel for all parameters; torch has it for these


def settings_class(name: str) -> type[Optimizer]:
    """Returns the settings that an optimizer has; for `module:Class` those of its constructor."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" in name:
        return _foreign(name)
    raise UserError(f"unknown optimizer '{name}'", did_you_mean(name, OPTIMIZERS))


@functools.cache
def _foreign(name: str) -> type[Optimizer]:
    """A settings class with the keyword arguments of an optimizer class from elsewhere."""
    constructor = _import(name).__init__
    try:
        hints = typing.get_type_hints(constructor)
    except (NameError, TypeError):  # hints that only its author's type checker can resolve
        hints = {}
    own: list[tuple[str, Any, Any]] = []
    for parameter in list(inspect.signature(constructor).parameters.values())[2:]:
        if parameter.name in ("lr", "name", "every") or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        default = MISSING if parameter.default is parameter.empty else parameter.default
        if default is MISSING or isinstance(default, (int, float, str, bool, tuple, type(None))):
            kind = _plain(hints.get(parameter.name)) or _kind_of(default)
            own.append((parameter.name, kind, field(default=default)))
    return make_dataclass("Foreign", own, bases=(Optimizer,), frozen=True, kw_only=True)


def _plain(hint: Any) -> Any:
    """What of a type can be given in words: `float | Tensor` is float; None where that is nothing."""
    if hint in (int, float, str, bool, type(None), ...):
        return hint
    inner = [_plain(part) for part in typing.get_args(hint)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kept = [part for part in inner if part]
        return functools.reduce(operator.or_, kept) if set(kept) - {type(None)} else None
    return types.GenericAlias(tuple, tuple(inner)) if typing.get_origin(hint) is tuple and all(inner) else None


def _kind_of(default: Any) -> Any:
    """The type that an argument without a usable hint seems to have: a 0 may stand for 0.0."""
    if isinstance(default, tuple):
        return types.GenericAlias(tuple, tuple(_kind_of(part) for part in default))
    if default is None or default is MISSING:
        return Any
    return int | float if type(default) is int else type(default)


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(
            f"optimizer.name={name}: cannot import '{module}': {error}", "install it, or correct the name"
        ) from error
    except AttributeError:
        raise UserError(f"optimizer.name={name}: module '{module}' has no '{attribute}'",
                        did_you_mean(attribute, dir(importlib.import_module(module)))) from None  # fmt: skip


def create(settings: Optimizer, parameters: Iterable["torch.nn.Parameter"]) -> "torch.optim.Optimizer":
    """Returns torch's optimizer for these settings."""
    import torch

    values: dict[str, Any] = asdict(settings)
    name, _ = values.pop("name"), values.pop("every")
    if "beta1" in values:
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    if name not in _CLASSES:
        return _import(name)(parameters, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if name in _FUSED:
        values["fused"] = True
    return getattr(torch.optim, _CLASSES[name])(parameters, **values)
