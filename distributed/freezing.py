"""Which parts of a network learn, and from when: pure functions of names and epochs."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from tasks.errors import UserError, did_you_mean


def frozen(names: Iterable[str], freeze: tuple[str, ...], unfreeze: tuple[str, ...], epoch: int) -> frozenset[str]:
    """Returns the parameters of `names` that do not learn in an epoch (from 0).

    `freeze` are patterns of names; `unfreeze` says `PATTERN@EPOCH`: what matches learns from that epoch on (gradual
    unfreezing, Howard and Ruder, 2018). Raises UserError for a pattern that no name matches, and for no epoch.
    """
    names = list(names)
    still = {name for pattern in freeze for name in matching("train.freeze", pattern, names)}
    for one in unfreeze:
        pattern, at, when = one.rpartition("@")
        if not at or not when.isdigit() or int(when) < 1:
            raise UserError(
                f"train.unfreeze={one}: expected PATTERN@EPOCH, the epochs counted from 0",
                "such as train.unfreeze=layer4@1,layer3@2: from the second and the third epoch on",
            )
        if not freeze:
            raise UserError(f"train.unfreeze={one}: nothing is frozen", "say what by train.freeze")
        free = matching("train.unfreeze", pattern, names)
        if epoch >= int(when):
            still -= free
    return frozenset(still)


def matching(setting: str, pattern: str, names: Iterable[str]) -> set[str]:
    """Returns the names that a pattern means: a whole name, all below a part of it, or what `*` and `?` stand for.

    Raises UserError where there is none.
    """
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not found:
        parts = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
        raise UserError(f"{setting}={pattern}: no parameter of the network is called so", did_you_mean(pattern, parts))
    return found
