"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): pictures of 32x32 pixels, as pickles of Python 2 or in the binary version.

A pickle is a program. It is not run here: a walk over its steps follows those that plain data and one kind of array
are made of, and refuses the first other one. No object is made on the file's word.
"""

import io
import pickletools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tasks.errors import UserError
from tasks.formats import archives, table

WIDTH = 3072  # 32 x 32 pixels, all red ones first, then green, then blue
MAX_BYTES = 2**28  # of one file; the largest genuine one has 155 MB
MAX_STEPS = 1_000_000  # of one pickle; CIFAR-100's train, the largest, has about 200,000
BROKEN = "download the archive again, and put nothing else into the folder that it unpacks to"
FILES = {10: ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]), 100: (["train"], ["test"])}
LAYOUTS = {  # classes -> folder, archive, file that names the classes, ending of the other files
    10: (
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", "batches.meta", ""),
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "batches.meta.txt", ".bin"),
    ),
    100: (
        ("cifar-100-python", "cifar-100-python.tar.gz", "meta", ""),
        ("cifar-100-binary", "cifar-100-binary.tar.gz", "fine_label_names.txt", ".bin"),
    ),
}
# The only names in a genuine pickle: by which numpy saves an array, and Python 3 saves bytes for Python 2.
ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
ENCODE = "_codecs encode"
KNOWN = {*ARRAY, ENCODE, "numpy ndarray", "numpy dtype"}


class Part(NamedTuple):
    """The rows of one split."""

    images: np.ndarray  # (N, 3, 32, 32) uint8
    labels: np.ndarray  # (N,) int64


class Cifar(NamedTuple):
    """The whole set; `names` are its classes in the order of their numbers."""

    train: Part
    test: Part
    names: tuple[str, ...]


def read(path: Path, classes: Literal[10, 100]) -> Cifar:
    """Reads CIFAR-10 or CIFAR-100 (its 100 fine classes) from its folder, the folder above, or its .tar.gz.

    Raises UserError naming the file for anything that is not the data set. Nothing in a file is run.
    """
    described, ending = _found(path, classes)
    read_part = _binary if ending else _pickled
    names = _names(described, classes, is_binary=bool(ending))
    train, test = (
        [read_part(described.with_name(f"{name}{ending}"), classes) for name in files] for files in FILES[classes]
    )
    return Cifar(_joined(train), _joined(test), names)


def _found(path: Path, classes: int) -> tuple[Path, str]:
    """Returns the file that names the classes, and the ending of those beside it: "" for pickles, .bin."""
    folder = archives.unpacked(path)
    for name, _, described, ending in LAYOUTS[classes]:
        for candidate in (folder / described, folder / name / described):
            if candidate.is_file():
                return candidate, ending
    for _, archive, _, _ in LAYOUTS[classes]:
        if (folder / archive).is_file():
            return _found(folder / archive, classes)
    (_, python, pickled, _), (_, binary, text, _) = LAYOUTS[classes]
    raise UserError(
        f"{path}: there is no CIFAR-{classes}: neither {pickled} nor {text}",
        f"name {python}, {binary} or the folder that one of them unpacks to",
    )


def _names(path: Path, classes: int, *, is_binary: bool) -> tuple[str, ...]:
    if is_binary:
        names = [line.strip() for line in table.text(path).splitlines() if line.strip()]
    else:
        names = _entry(path, _unpickled(path), "label_names" if classes == 10 else "fine_label_names", list)
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
    if len(names) != classes or len({name for name in names if isinstance(name, str)}) != classes:
        raise UserError(f"{path}: names {len(names)} classes, expected {classes} different ones", BROKEN)
    return tuple(names)


def _joined(parts: list[Part]) -> Part:
    return parts[0] if len(parts) == 1 else Part(*map(np.concatenate, zip(*parts, strict=True)))


def _part(path: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> Part:
    """Checks pixels (N, 3072) uint8 and labels (N,) against one another."""
    if len(labels) != len(pixels):
        raise UserError(f"{path}: has {len(labels)} labels for {len(pixels)} pictures", BROKEN)
    if not len(labels):
        raise UserError(f"{path}: holds no pictures", BROKEN)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{path}: has labels {labels.min()}..{labels.max()}, expected 0..{classes - 1}", BROKEN)
    return Part(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64))


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", BROKEN) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the rights of the file") from error
    if not content:
        raise UserError(f"{path}: is empty", BROKEN)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: has over {MAX_BYTES} bytes", BROKEN)
    return content


def _binary(path: Path, classes: int) -> Part:
    """Reads rows of one byte for the class (CIFAR-100: one for the coarse, one for the fine class) and the pixels."""
    content = np.frombuffer(_content(path), np.uint8)
    before = 1 if classes == 10 else 2
    if len(content) % (before + WIDTH):
        raise UserError(f"{path}: has {len(content)} bytes, no multiple of the {before + WIDTH} of a picture", BROKEN)
    rows = content.reshape(-1, before + WIDTH)
    return _part(path, rows[:, before:], rows[:, before - 1], classes)


# ---- pickles, which are looked at and not run


class _Name(str):
    """A name of something in a module, as a pickle gives it; one of `KNOWN`."""


class _Call(NamedTuple):
    """What a pickle would have made by calling `name`; `state` is empty, or holds what it would have been given."""

    name: str
    arguments: tuple
    state: list


def _pickled(path: Path, classes: int) -> Part:
    batch = _unpickled(path)
    pixels = _pixels(path, _entry(path, batch, "data", _Call))
    labels = _entry(path, batch, "labels" if classes == 10 else "fine_labels", list)
    for label in labels:
        if type(label) is not int or not -(2**63) <= label < 2**63:
            raise UserError(f"{path}: a label is a {type(label).__name__}, expected a number below {classes}", BROKEN)
    return _part(path, pixels, np.array(labels, np.int64), classes)


def _entry(path: Path, batch: Any, name: str, kind: type) -> Any:
    if not isinstance(batch, dict):
        raise UserError(f"{path}: holds a {type(batch).__name__}, expected a dict", BROKEN)
    value = batch.get(name.encode(), batch.get(name))  # what was text to Python 2 is bytes
    if value is None:
        raise UserError(f"{path}: has no '{name}'", BROKEN)
    if not isinstance(value, kind):
        raise UserError(f"{path}: its '{name}' is no {'array' if kind is _Call else kind.__name__}", BROKEN)
    return value


def _pixels(path: Path, call: _Call) -> np.ndarray:
    """Returns the array that a pickle of numpy's describes, uint8 (N, 3072)."""
    match call.state if call.name in ARRAY else None:  # version, shape, dtype, whether in Fortran's order, content
        case [(1, (int(rows), int(width)), _Call("numpy dtype", (str() | bytes() as dtype, *_)), fortran, bytes(raw))]:
            pass
        case _:
            raise UserError(f"{path}: its 'data' is no array of two dimensions as numpy saves one", BROKEN)
    if dtype not in ("u1", b"u1", "|u1", b"|u1"):
        raise UserError(f"{path}: its 'data' has the type {dtype!r:.40}, expected 'u1', which is uint8", BROKEN)
    if width != WIDTH:
        raise UserError(f"{path}: its 'data' has rows of {width} numbers, expected {WIDTH}", BROKEN)
    if len(raw) != rows * width:
        raise UserError(f"{path}: its 'data' has {len(raw)} bytes, expected {rows} x {width}", BROKEN)
    return np.frombuffer(raw, np.uint8).reshape((rows, width), order="F" if fortran is True else "C")


def _unpickled(path: Path) -> Any:
    """Returns what a pickle holds: dicts, lists, tuples, text, bytes and numbers, and calls as `_Call`."""
    content = _content(path)
    try:
        return _walked(path, content)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        reason = f"is no whole pickle: {error!s:.200}; it begins with {content[:20]!r}"
        raise UserError(f"{path}: {reason}", BROKEN) from None


def _walked(path: Path, content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    room = MAX_BYTES  # for text that becomes bytes: one text can be named many times

    def above_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        if step > MAX_STEPS:
            raise ValueError(f"it has over {MAX_STEPS} steps")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES":  # of protocol 3 and above
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(str(argument).encode("latin-1"))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                place = len(memo) if argument is None else argument
                if place > step:  # unpickling would reserve all the places before it
                    raise ValueError(f"its step {step} remembers something in place {place}")
                memo[place] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = above_mark()
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = above_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, str | bytes) for key in pairs[::2]):  # tuples of tuples take ages to hash
                    raise ValueError("a key is no text")
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument or " ".join([stack.pop(-2), stack.pop()])
                if name not in KNOWN:
                    reason = f"its pickle wants to call {name!r:.100}, which no genuine one does; nothing was run"
                    raise UserError(f"{path}: {reason}", "do not open this file elsewhere either; " + BROKEN)
                stack.append(_Name(name))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                if not isinstance(name, _Name) or not isinstance(arguments, tuple):
                    raise ValueError("it calls what has no name")
                if name == ENCODE:
                    text, encoding = arguments
                    room -= len(text)
                    if encoding != "latin1":
                        raise ValueError("it encodes text unlike Python does")
                    if room < 0:
                        raise ValueError("it makes bytes of more text than it holds")
                    stack.append(text.encode("latin-1"))
                else:
                    stack.append(_Call(name, arguments, []))
            case "BUILD":
                state = stack.pop()
                stack[-1].state[:] = [state]
            case _:
                raise ValueError(f"plain data need no {opcode.name}")
    raise ValueError("it has no end")
