"""The optimizers by name, each with the settings that it has; any other class by `module:Class`.

Parameters of one rate and decay form a group (`groups`); the optimizer's state may lie in shares on the ranks.
"""

import functools
import importlib
import inspect
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from distributed import freezing
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
    parts: tuple[str, ...] = ()  # PATTERN=FACTOR of lr for parameters called so, such as backbone=0.1; the first counts
    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0  # factor of lr from each layer to the one before it
    decay_on: Literal["all", "matrices"] = "all"  # matrices: biases and normalisation layers are not decayed
    l1: NotNegative = 0.0  # L1 penalty: pull of each weight towards 0, whatever its size


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


_SHARED = {field.name for field in fields(Optimizer)}
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
        if parameter.name in _SHARED or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
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
        raise UserError(f"cannot import '{module}': {error}", "install it, or correct the name") from error
    except AttributeError:
        raise UserError(f"module '{module}' has no '{attribute}'",
                        did_you_mean(attribute, dir(importlib.import_module(module)))) from None  # fmt: skip


# ---- groups of parameters


def groups(
    settings: Optimizer, named: Mapping[str, "torch.nn.Parameter"], among: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Returns torch's parameter groups: "params", "rate" (a factor of lr), and "weight_decay" where it is not that of
    the settings.

    `parts` come before `layer_decay` (Clark et al., 2020), whose layers are the numbered blocks of the network and the
    children of its root, in the order in which they hold parameters. Both are of all names `among` which `named` are:
    what is frozen for now keeps its rate for later. Raises UserError for a part that is not there.
    """
    rates = _rates(settings, list(among) or list(named))
    decays = getattr(settings, "weight_decay", 0.0) and settings.decay_on == "matrices"
    found: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        spared = bool(decays) and parameter.ndim < 2
        group = found.setdefault((rates[name], spared), {"params": [], "rate": rates[name]})
        if spared:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return list(found.values())


def _rates(settings: Optimizer, names: list[str]) -> dict[str, float]:
    layers = list(dict.fromkeys(map(_layer_of, names)))
    depth = {layer: len(layers) - 1 - at for at, layer in enumerate(layers)}
    rates = {name: settings.layer_decay ** depth[_layer_of(name)] for name in names}
    for one in reversed(settings.parts):
        pattern, equals, factor = one.rpartition("=")
        try:
            rate = float(factor)
        except ValueError:
            rate = -1.0
        if not equals or not 0 <= rate < float("inf"):
            raise UserError(f"optimizer.parts={one}: expected PATTERN=FACTOR", "such as optimizer.parts=backbone=0.1")
        rates |= dict.fromkeys(freezing.matching("optimizer.parts", pattern, names), rate)
    return rates


def _layer_of(name: str) -> str:
    """The numbered block that a parameter belongs to, else the child of the root."""
    parts = name.split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else parts[0]


# ---- torch's optimizers


def create(settings: Optimizer, parameters: Iterable[Any], *, sharded: bool = False) -> "torch.optim.Optimizer":
    """Returns torch's optimizer for these settings; `parameters` may be groups.

    `sharded`: its state lies in shares on the ranks (ZeRO, stage 1; Rajbhandari et al., 2020); a collective then.
    """
    values: dict[str, Any] = {name: value for name, value in asdict(settings).items() if name not in _SHARED}
    if "beta1" in values:
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    values["lr"] = settings.lr
    if settings.name in _CLASSES:
        cls = _unguarded(_CLASSES[settings.name])
        cls = _from_zero(cls) if settings.name == "sgd" else cls
        if settings.name in _FUSED:
            values["fused"] = True
    else:
        cls = _import(settings.name)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(list(parameters), optimizer_class=cls, **values)
    return cls(parameters, **values)


@functools.cache
def _unguarded(name: str) -> Any:
    """Returns an optimizer class of torch that does not import the compiler.

    Half of the time to a first step is the import of torch._dynamo, by guards that are of use only where the optimizer
    itself is compiled. Its methods are kept from the compiler by a function that each of them remembers; and `step` is
    the one inside the guard, called without gradients as the guard would.
    """
    import torch
    from torch.optim.optimizer import Optimizer as Guarded

    cls = getattr(torch.optim, name)
    try:
        for method in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
            inner = getattr(Guarded, method).__wrapped__
            inner.__dynamo_disable = inner
        step = cls.step
        while hasattr(step, "__wrapped__"):
            step = step.__wrapped__
    except AttributeError:  # another torch is made otherwise: slower to start, as right
        return cls
    return type(name, (cls,), {"step": torch.no_grad()(step), "__module__": cls.__module__})


@functools.cache
def _from_zero(cls: Any) -> Any:
    """Returns torch's SGD so that every momentum begins as 0, which gives the first step that torch gives.

    torch's fused kernel asks for a momentum of all parameters or of none, and fails where some were set free later, or
    had no gradient in the first step. Where float16 overflows in the first step, it goes on from memory that nobody
    has written (torch 2.14, sgd.py, _fused_sgd).
    """
    import torch

    def gather(self: Any, group: Any, parameters: Any, gradients: Any, momenta: list[Any]) -> bool:
        sparse = cls._init_group(self, group, parameters, gradients, momenta)
        momenta[:] = [torch.zeros_like(p) if m is None else m for p, m in zip(parameters, momenta, strict=False)]
        return sparse

    return type(cls.__name__, (cls,), {"_init_group": gather, "__module__": cls.__module__})
