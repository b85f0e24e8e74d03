"""The formats that a network can be written in: each one writes bytes, and runs them to be compared."""

import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tasks.errors import UserError

Inputs = dict[str, Tensor]
Sizes = dict[str, dict[int, str]]  # input -> dimension -> name of its size, where that may be any


class Program(Protocol):
    """A format."""

    suffix: str

    def check(self) -> None:
        """Raises UserError where a package is missing."""
        ...

    def write(self, network: nn.Module, inputs: Inputs, sizes: Sizes) -> bytes: ...

    def run(self, written: bytes, names: list[str]) -> Callable[..., Any]:
        """Returns what was written as a function of the inputs, in their order."""
        ...


class TorchExport:
    """torch.export's own archive (.pt2): for Python and C++ with torch, without the code of the network."""

    suffix = ".pt2"

    def check(self) -> None:
        pass

    def write(self, network: nn.Module, inputs: Inputs, sizes: Sizes) -> bytes:
        if _fixes_lengths(network, sizes):
            raise UserError("torch.export fixes the length of what recurrent layers read, and this network has some",
                            "take --to torchscript or --to onnx")  # fmt: skip
        written = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            torch.export.save(_exported(network, inputs, sizes), written)
        return written.getvalue()

    def run(self, written: bytes, names: list[str]) -> Callable[..., Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(io.BytesIO(written)).module()


class TorchScript:
    """TorchScript (.pt), traced: for C++ with torch, recurrent networks included; torch adds nothing to it any more."""

    suffix = ".pt"

    def check(self) -> None:
        pass

    def write(self, network: nn.Module, inputs: Inputs, sizes: Sizes) -> bytes:
        written = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(_tried(lambda: torch.jit.trace(network, tuple(inputs.values()))), written)
        return written.getvalue()

    def run(self, written: bytes, names: list[str]) -> Callable[..., Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(io.BytesIO(written))


class Onnx:
    """ONNX, for the runtimes of others; compared by onnxruntime."""

    suffix = ".onnx"

    def check(self) -> None:
        missing = [one for one in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(one) is None]
        if missing:
            raise UserError(
                f"exporting to ONNX needs {', '.join(missing)}", "pip install -e '.[onnx]' -c constraints.txt"
            )

    def write(self, network: nn.Module, inputs: Inputs, sizes: Sizes) -> bytes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _fixes_lengths(network, sizes):  # the older exporter knows recurrent layers of any length
                written: Any = io.BytesIO()
                named = {"input_names": list(inputs), "dynamic_axes": sizes}
                _tried(lambda: torch.onnx.export(network, tuple(inputs.values()), written, dynamo=False, **named))
                return written.getvalue()
            program = torch.onnx.export(
                _exported(network, inputs, sizes), input_names=list(inputs), dynamo=True, verbose=False
            )
        assert program is not None
        return program.model_proto.SerializeToString()

    def run(self, written: bytes, names: list[str]) -> Callable[..., Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
        taken = [one.name for one in session.get_inputs()]

        def call(*inputs: Tensor) -> list[Tensor]:
            given = {name: value.numpy() for name, value in zip(names, inputs, strict=True) if name in taken}
            return [torch.from_numpy(value) for value in session.run(None, given)]

        return call


def _fixes_lengths(network: nn.Module, sizes: Sizes) -> bool:
    """Whether torch.export would take one length only: it unrolls recurrent layers."""
    varies = any(axis > 0 for free in sizes.values() for axis in free)
    return varies and any(isinstance(module, nn.RNNBase) for module in network.modules())


def _exported(network: nn.Module, inputs: Inputs, sizes: Sizes) -> Any:
    free = tuple(dict.fromkeys(sizes[name], torch.export.Dim.AUTO) for name in inputs)
    return _tried(lambda: torch.export.export(network, tuple(inputs.values()), dynamic_shapes=free))


def _tried(trace: Callable[[], Any]) -> Any:
    """Raises UserError naming what of the network cannot be traced."""
    try:
        return trace()
    except Exception as error:
        words = str(error).strip().splitlines()
        raise UserError(
            f"the network cannot be exported: {type(error).__name__}: {words[0] if words else ''}",
            "its forward must not branch on the values of tensors; --debug shows torch's words",
        ) from error


PROGRAMS: dict[str, Program] = {"torch": TorchExport(), "torchscript": TorchScript(), "onnx": Onnx()}
