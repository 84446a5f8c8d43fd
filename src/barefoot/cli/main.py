"""The ``barefoot`` command: parses arguments, runs a subcommand, and turns what goes wrong into one line and a code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from barefoot import __version__
from barefoot.cli import console
from barefoot.cli.commands import all_commands
from barefoot.core.errors import BarefootError

DEBUG_VARIABLE = "BAREFOOT_DEBUG"
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 2, 130, 141
EXIT_CODES = {
    0: "done",
    1: "another error",
    2: "wrong usage or invalid input",
    3: "does not fit the stated memory",
    4: "techniques, or a technique and the model, don't go together",
    5: "the file is sound, but holds something that barefoot does not know",
    6: "the file is corrupt",
    7: "an optional library or a compiled part is missing",
    8: "no such model, file or package, or it could not be fetched",
    EXIT_INTERRUPTED: "interrupted by Ctrl-C",
    EXIT_PIPE_CLOSED: "whoever read the output went away",
}

DESCRIPTION = "Neural networks inside a stated memory budget: say how much memory you have, and the job fits."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all other errors."""

    def error(self, message: str) -> NoReturn:
        console.print_error(message, f"see {self.prog} --help")
        raise SystemExit(EXIT_USAGE)


class CommandParser(Parser):
    """A subcommand's parser: options may stand before, between and after the positional arguments.

    argparse does this when asked, but a parser of subcommands does not ask: there, what follows an option is refused
    where an optional positional argument could stand.
    """

    _inner = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self._inner:  # parse_known_intermixed_args comes back here
            return super().parse_known_args(args, namespace)
        self._inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inner = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; ``args.execute`` is the chosen one's function."""
    parser = Parser(
        prog="barefoot",
        description=DESCRIPTION,
        epilog="exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    )
    parser.add_argument("--version", action="version", version=f"barefoot {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=CommandParser)
    for name, command in all_commands().items():
        sub = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # --prompt is no short --prompts
        )
        command.configure(sub)
        sub.add_argument(
            "--json",
            metavar="FILE",
            nargs="?",
            const=console.STDOUT,
            help="write the result as one JSON object to FILE; to standard output, in place of the text, without FILE",
        )
        sub.set_defaults(execute=command.execute)
    return parser


def _fail(error: Exception, json_target: str | None) -> int:
    """Say what went wrong: one line, and what to do about it."""
    from barefoot.cli.report import error_json

    if json_target:
        with contextlib.suppress(OSError):  # the file that can't be written may be what went wrong
            console.write_json(error_json(error), json_target)
    if isinstance(error, BarefootError):
        console.print_error(str(error), error.cure)
        return error.exit_code
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    console.print_error(what, None if isinstance(error, OSError) else f"{DEBUG_VARIABLE}=1 shows where it happened")
    return BarefootError.exit_code


def _close_stdout() -> int:
    """The reader is gone: nothing more can be said, and the interpreter must not try to at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_PIPE_CLOSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` when None) and return the exit code."""
    console.set_up_streams()
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    json_target = None
    try:
        args = build_parser().parse_args(argv)
        json_target = args.json
        code = args.execute(args)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse: help, version, usage
        return int(stop.code or 0)
    except BrokenPipeError:
        return _close_stdout()
    except KeyboardInterrupt:
        console.print_note("\ninterrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(error, json_target)
    return int(code)
