"""Entry of the command: finds the verb, and turns whatever goes wrong into a message and an exit code."""

import bdb
import contextlib
import logging
import os
import sys

import typer

from distributed.cli.output import FAILED, INTERRUPTED, MISUSED, OK, OUT, explain, silence
from tasks.errors import RunFailed, UserError

HELP = """Trains and tunes deep-learning models, on this machine or on a Ray cluster.

With every command: --json (one JSON object on stdout, progress on stderr), --debug (whole tracebacks)."""


def application() -> typer.Typer:
    """Returns the command with all its verbs. Importing a verb is cheap: what it needs, it imports when called."""
    from distributed.cli import (
        config,
        data,
        doctor,
        evaluate,
        export,
        find,
        jobs,
        new,
        predict,
        replay,
        runs,
        submit,
        tasks,
        train,
        tune,
        verify,
    )

    app = typer.Typer(help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    for verb in (train.train, tune.tune, evaluate.evaluate, predict.predict, runs.runs):
        app.command()(verb)
    app.command("export")(export.export)
    app.command("tasks")(tasks.tasks)
    app.command("new")(new.new)
    app.command("config")(config.config)
    app.add_typer(data.app, name="data")
    app.add_typer(find.app, name="find")
    app.command("verify")(verify.verify)
    app.command("replay")(replay.replay)
    app.command("doctor")(doctor.doctor)
    app.command("submit", context_settings={"ignore_unknown_options": True})(submit.submit)
    for verb in (jobs.jobs, jobs.logs, jobs.stop):
        app.command()(verb)
    return app


def run(words: list[str]) -> int:
    """Runs one command; returns its exit code: 0, 1 failed, 2 the user's mistake, 130 interrupted."""
    _open_closed_streams()
    words = _take_global(words)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    OUT.stdout = sys.stdout
    # A program reads stdout: whatever a library or a worker prints there goes to stderr.
    with contextlib.redirect_stdout(sys.stderr) if OUT.json else contextlib.nullcontext():
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        command = typer.main.get_command(application())
        with command.make_context("whipray", words or ["--help"]) as context:
            code = command.invoke(context)
        return code if isinstance(code, int) else OK
    except typer.Exit as exit_:  # of --help
        return exit_.exit_code
    except UserError as error:
        _traceback(error)
        OUT.error(error.message, error.hint)
        return MISUSED
    except RunFailed as error:
        _traceback(error)
        OUT.error(str(error), "; ".join(getattr(error, "__notes__", [])))
        return FAILED
    except typer.TyperException as error:  # a verb, option or argument that is not there, or does not fit
        context = getattr(error, "ctx", None)
        message = error.format_message().replace("Value error, ", "")
        OUT.error(message, f"{context.command_path if context else 'whipray'} --help")
        return MISUSED
    except bdb.BdbQuit:
        OUT.error("left the debugger", "the same command with the same --name goes on from the last checkpoint")
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        OUT.error("interrupted", "the same command with the same --name goes on from the last checkpoint")
        return INTERRUPTED
    except BrokenPipeError as error:  # nobody reads the result
        _traceback(error)
        silence(OUT.stdout)
        return FAILED
    except Exception as error:  # noqa: BLE001 - the one place where all that is unforeseen ends
        _traceback(error)
        OUT.error(*explain(error))
        return FAILED


def _open_closed_streams() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`2>&-`) one that nobody reads.

    Without it a file of the run would be opened in its place, and get whatever a library says there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:  # nothing has taken its place yet
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere != number:
                os.close(nowhere)
        setattr(sys, name, open(os.devnull, "r+" if number == 0 else "w"))  # noqa: PTH123, SIM115 - while the process lives


def _take_global(words: list[str]) -> list[str]:
    """Takes out what may stand anywhere before `--`."""
    end = words.index("--") if "--" in words else len(words)
    OUT.json, OUT.debug = "--json" in words[:end], "--debug" in words[:end]
    return [word for word in words[:end] if word not in ("--json", "--debug")] + words[end:]


def _traceback(error: BaseException) -> None:
    if OUT.debug:
        import traceback

        sys.stderr.write(getattr(error, "remote_traceback", ""))
        traceback.print_exception(error)
