"""Tensors as the bytes of safetensors files: set down in memory that the next snapshot uses again, and read back.

A snapshot costs one copy of the tensors; what is written later comes straight from it. Format: 8 bytes with the length
of a header, the header (JSON: type, shape and place of every tensor), the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Files = Mapping[str, Mapping[str, "Tensor"]]  # file name -> tensor name -> tensor
TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
ALIGNMENT = 64  # bytes; where a file's tensors begin in the buffer


class Snapshot:
    """What tensors held at one moment; pinned where they are on a GPU, so that it fills the buffer by itself."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._buffer: Tensor | None = None
        self._headers: dict[str, bytes] = {}
        self._spans: dict[str, slice] = {}  # of each file's tensors in the buffer
        self._views: dict[str, dict[str, Tensor]] = {}  # the buffer, as the tensors that it holds

    def prepare(self, files: Files) -> None:
        """Lays out memory for such tensors, unless the last one was of the same; raises UserError for odd types."""
        layout = [
            (file, name, tensor.dtype, tensor.shape, tensor.is_cuda)
            for file, tensors in files.items()
            for name, tensor in tensors.items()
        ]
        if self._buffer is None or layout != self._layout:
            self._layout = []  # until all of the new one stands
            self._lay_out(files)
            self._layout = layout

    def _lay_out(self, files: Files) -> None:
        import torch

        self._headers, self._spans, self._views = {}, {}, {}
        places: dict[str, dict[str, slice]] = {}
        end = 0
        for file, tensors in files.items():
            begin = end + -end % ALIGNMENT
            self._headers[file], places[file] = _header(tensors)
            end = begin + sum(tensor.nbytes for tensor in tensors.values())
            self._spans[file] = slice(begin, end)
        pinned = any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values())
        if self._buffer is None or self._buffer.numel() < end or self._buffer.is_pinned() != pinned:
            self._buffer = None  # its memory is free before more is asked for
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
            self._buffer.zero_()  # the kernel hands out the pages here, not while a training waits for the copy
        for file, tensors in files.items():
            whole = self._buffer[self._spans[file]]
            self._views[file] = {
                name: whole[place].view(tensors[name].dtype).view(tensors[name].shape)
                for name, place in places[file].items()
            }

    def take(self, files: Files) -> None:
        """Copies the tensors; when it returns they may change."""
        import torch

        self.prepare(files)
        devices = set()
        with torch.no_grad():
            for file, tensors in files.items():
                for name, tensor in tensors.items():
                    self._views[file][name].copy_(tensor, non_blocking=tensor.is_cuda)
                    if tensor.is_cuda:
                        devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def first_odd(self, file: str, names: Collection[str]) -> str | None:
        """Returns the first of some tensors, in the order of their names, that holds a number which is not finite."""
        return next((name for name in sorted(names) if not self._views[file][name].isfinite().all()), None)

    def pieces(self, file: str) -> tuple[bytes, memoryview]:
        """Returns the two parts of a file, the second of which the next `take` overwrites."""
        assert self._buffer is not None, "nothing was taken"
        return self._headers[file], self._buffer.numpy()[self._spans[file]].data

    @property
    def num_bytes(self) -> int:
        return sum(len(self._headers[file]) + span.stop - span.start for file, span in self._spans.items())


def _header(tensors: Mapping[str, "Tensor"]) -> tuple[bytes, dict[str, slice]]:
    """Returns the head of a file of these tensors, and where each lies behind it: the widest types first, aligned."""
    entries, places = {}, {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in TYPES:
            raise UserError(f"'{name}' of the model is {kind}, which no checkpoint can hold",
                            "keep it in another type, or out of the model's state: persistent=False")  # fmt: skip
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": TYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        places[name] = slice(begin, end)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


def read(path: Path) -> dict[str, "Tensor"]:
    """Returns the tensors of a file; raises ValueError for a file that is not as the format has it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER:
        raise ValueError(f"{path.name} has a header of {length} bytes, {MOST_HEADER} are the most")
    try:
        json.loads(data[8 : 8 + length], object_pairs_hook=_once)
        return load(data)
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The library would take the last of several tensors of one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' stands twice in the header")
        found[name] = value
    return found
