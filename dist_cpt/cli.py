"""The dist-cpt command: its groups of commands, and how each of them ends. Loads no torch before a command needs it."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from typing import Annotated

import typer

from dist_cpt import __version__
from dist_cpt.commands import after_training, before_training, data, look, run, tokenizer, tools
from dist_cpt.commands.arguments import TOOLS
from dist_cpt.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, ConfigError, DistCptError, say
from dist_cpt.storage import explained

INTERRUPTED = 130
READER_GONE = 128 + signal.SIGPIPE  # as of a program that the signal ends: dist-cpt ... | head -1

app = typer.Typer(
    name="dist-cpt",
    help="Distributed continued pretraining: any run resumes anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (before_training, run, look, after_training, tools):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data", rich_help_panel=TOOLS)
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel=TOOLS)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: every user error is one line and its documented exit code."""
    _open_standard_streams()
    stdout = os.dup(1)  # rich puts /dev/null in its place when its reader is gone
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer returns after Ctrl-C
            code = _interrupted()
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except DistCptError as error:
        say(f"dist-cpt: {error}")
        code = error.exit_code
    except SystemExit as ended:  # typer's own 1 for a broken pipe, or a library's
        code = ended.code
        if isinstance(ended.__context__, BrokenPipeError) and _reader_is_gone(stdout):
            code = READER_GONE
    except Exception as error:  # a defect of ours: print the traceback too
        known = explained(error)
        usage = getattr(error, "format_message", None)  # click's own usage errors
        if usage is not None:
            message = usage()  # none: no command was given, and the help has been printed
            if message:
                print(f"dist-cpt: {message}", file=sys.stderr)
            code = ConfigError.exit_code if message else EXIT_DONE
        elif isinstance(known, DistCptError):
            say(f"dist-cpt: {known}")
            code = known.exit_code
        else:
            traceback.print_exc()
            print("dist-cpt: internal error; this is a defect of dist-cpt", file=sys.stderr)
            code = EXIT_INTERNAL
    _flush_output()
    sys.exit(code if isinstance(code, int) else EXIT_DONE)


def _flush_output() -> None:
    """Flush while a failure can still be ignored: at exit, Python would turn it into code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Give what was closed before the start /dev/null: else a file of the run gets its number, and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _reader_is_gone(stdout: int) -> bool:
    """Whether nobody reads stdout any more, as after `| head`; else a broken pipe was another one, a defect."""
    poll = select.poll()
    poll.register(stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _interrupted() -> int:
    print("dist-cpt: interrupted; finished work is kept", file=sys.stderr)
    return EXIT_STOPPED


if __name__ == "__main__":
    main()
