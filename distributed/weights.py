"""Where weights come from: the best checkpoint of a run, a file, or torchvision. Nothing of a file is executed.

No torch here before a reference is read.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import checkpoint, saved
from tasks.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

TORCHVISION = "torchvision/"
FILES = (".safetensors", ".pth", ".pt")
NESTED = ("state_dict", "model_state_dict", "model")  # where other programs keep the tensors of a training's file


def check(reference: str, runs: Path) -> None:
    """Raises UserError where there is no such run, file or network; reads no tensor, and fetches nothing."""
    if reference.startswith(TORCHVISION):
        _torchvision_weights(reference)
    elif _is_file(reference):
        _check_file(Path(reference))
    else:
        _run_directory(reference, runs)


def read(reference: str, runs: Path) -> "dict[str, Tensor]":
    """Returns the named tensors of a run's best checkpoint, of a file, or of a network of torchvision, on the CPU.

    Raises UserError for what is not there, cannot be had, or is no file of weights. No code of a file is run.
    """
    if reference.startswith(TORCHVISION):
        return _from_file(_fetched(reference))
    if _is_file(reference):
        return _from_file(Path(reference))
    return checkpoint.chosen(_run_directory(reference, runs), "best").model


def _is_file(reference: str) -> bool:
    return Path(reference).suffix in FILES or Path(reference).is_file()


def _run_directory(reference: str, runs: Path) -> Path:
    try:
        return saved.locate(reference, runs)
    except UserError as error:
        hint = f"{error.hint}; or give a file ({', '.join(FILES)}), or {TORCHVISION}NAME"
        raise UserError(f"initial weights: {error.message}", hint) from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights", "train.init_from=RUN, FILE or torchvision/NAME")
    if path.suffix not in FILES:
        raise UserError(f"{path}: is not known to be a file of weights",
                        f"its name must end with {', '.join(FILES)}")  # fmt: skip


def _from_file(path: Path) -> "dict[str, Tensor]":
    import torch

    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - bytes from anywhere may be wrong in any way
        words = str(error).strip().splitlines()
        raise UserError(
            f"{path}: cannot be read as tensors alone: {words[0] if words else type(error).__name__}",
            "it is damaged, or holds more than tensors; where you trust it, save its state_dict() as .safetensors",
        ) from None
    named = _named_tensors(content)
    if not named:
        raise UserError(f"{path}: holds no tensors by name", "save a network's state_dict()")
    return named


def _named_tensors(content: Any) -> "dict[str, Tensor]":
    """The state dict in what other programs write: at the top, or under one of the usual names."""
    import torch

    if not isinstance(content, Mapping):
        return {}
    for name in NESTED:
        if isinstance(content.get(name), Mapping):
            return _named_tensors(content[name])
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


# ---- torchvision


def _torchvision_weights(reference: str) -> Any:
    """The weights that `torchvision/NAME` or `torchvision/NAME:WEIGHTS` names; raises UserError with the nearest."""
    from torchvision import models

    name, _, which = reference.removeprefix(TORCHVISION).partition(":")
    if name not in models.list_models():
        raise UserError(f"torchvision has no network '{name}'", did_you_mean(name, models.list_models()))
    choices = models.get_model_weights(name)
    if not len(choices):
        raise UserError(f"torchvision has no weights of '{name}'", "take another network of the same kind")
    if which not in ("", "DEFAULT", *choices.__members__):
        there = ["DEFAULT", *choices.__members__]
        raise UserError(f"torchvision has no weights '{which}' of '{name}'", did_you_mean(which, there))
    return choices[which or "DEFAULT"]


def _fetched(reference: str) -> Path:
    """The file of torchvision's weights, in torch's cache (TORCH_HOME); fetched where it is not there yet."""
    import torch

    weights = _torchvision_weights(reference)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / weights.url.rpartition("/")[2]
    if not path.exists():
        try:
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError) as error:  # no network; a file that is not what its name says
            raise UserError(
                f"{reference}: cannot be fetched: {error}", f"put {weights.url} into {folder}, under its own name"
            ) from None
    return path


def is_network(reference: str) -> bool:
    """Whether a task's `load` can make a network of it without a run."""
    return reference.startswith(TORCHVISION)


def network(reference: str) -> "nn.Module":
    """Returns a network of torchvision with its pretrained weights.

    Raises UserError where there is none, or where its weights are not here and cannot be fetched.
    """
    from torchvision import models

    weights = _torchvision_weights(reference)
    _from_file(_fetched(reference))  # read with care first: what is wrong with it has a message of ours
    name = reference.removeprefix(TORCHVISION).partition(":")[0]
    with _weights_only():
        return models.get_model(name, weights=weights)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Lets torch.load run no code: torchvision reads its weights by torch's old default, and torch has a switch."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def refuse_file(reference: str) -> None:
    """Raises UserError where a task's `load` is given a file: it has weights, and no network to put them in."""
    if _is_file(reference):
        raise UserError(f"load('{reference}'): a file of weights is no network",
                        f"build the network, and set train.init_from={reference}")  # fmt: skip
