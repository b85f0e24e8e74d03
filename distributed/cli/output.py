"""How the commands speak: words for people, or one JSON object on stdout with everything else on stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tasks.errors import place_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


class Output:
    """Chosen once, from `--json` and `--debug`."""

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        self.silent = False  # from Python, where nothing is to be said
        self.stdout = sys.stdout  # where the JSON object goes; with --json all other words go to stderr

    def console(self) -> "Console":
        """Returns where words for people go."""
        terminal = (sys.stderr if self.json else sys.stdout).isatty()
        # A notebook gets lines too, though its kernel asks by the environment for what a terminal gets.
        return _console(
            stderr=self.json, highlight=False, soft_wrap=not terminal, quiet=self.silent, force_jupyter=False,
            force_terminal=terminal,
        )  # fmt: skip

    def say(self, *words: Any) -> None:
        console = self.console()
        with unless_full(console):
            console.print(*words, markup=False)

    def table(self, table: "Table") -> None:
        """Prints a table; where there is no terminal, as plain lines that are never cut off."""
        console = self.console()
        if not console.is_terminal:
            table.box, table.show_edge = None, False
            console.width = max(
                console.width, console.measure(table, options=console.options.update(width=10_000)).maximum
            )
        with unless_full(console):
            console.print(table)

    def result(self, value: dict[str, Any]) -> None:
        """Prints the one JSON object that a program asked for; nothing for a person."""
        if self.json:
            print(json.dumps(value, ensure_ascii=False, default=str), file=self.stdout, flush=True)

    def error(self, message: str, hint: str = "") -> None:
        if self.json:
            self.result({"error": {"message": message, "hint": hint}})
        from rich.text import Text

        console = _console(stderr=True, highlight=False, soft_wrap=True)
        with unless_full(console):
            console.print(Text("error: ", "bold red") + Text(message))
            if hint:
                console.print(Text(f"  {hint}", "yellow"))


def _console(**options: Any) -> "Console":
    """A console whose reader may go away: what the command does is worth more than what it says."""
    from rich.console import Console

    class Spoken(Console):
        def on_broken_pipe(self) -> None:
            """Would end the program."""
            silence(self.file)

    return Spoken(**options)


def silence(stream: Any) -> None:
    """Lets all that is written to a stream vanish, what it still holds included."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def unless_full(console: "Console") -> Iterator[None]:
    """Lets a training go on that is told to a file on a full disk."""
    try:
        yield
    except OSError:
        silence(console.file)


OUT = Output()


def counted(number: int, noun: str) -> str:
    """Returns "1 epoch" or "20 epochs"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def explain(error: BaseException) -> tuple[str, str]:
    """Returns an unforeseen error as one line that names where it arose, and what to do."""
    words, place = str(error).strip().splitlines(), place_of(error)
    message = f"{type(error).__name__}: {words[0] if words else ''}" + (f" ({place})" if place else "")
    return message, "; ".join(getattr(error, "__notes__", [])) or "--debug shows the whole traceback"
