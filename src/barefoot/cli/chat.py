"""The chat of ``barefoot run``: turns at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from barefoot.cli import console
from barefoot.cli.conversation import Answer, Conversation
from barefoot.core.errors import BarefootError

PROMPT = "> "
HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
MEMORY_HELP = "/memory SIZE allows more or less memory from now on"


def prepare() -> None:
    """Import what line editing needs, before a run measures what is reserved."""
    try:
        import readline  # noqa: F401  (input() uses it when it is there)
    except ImportError:
        return


def chat(
    conversation: Conversation, ask: Callable[[str], Answer], allow: Callable[[str], str] | None = None
) -> list[Answer]:
    """Ask for prompts until the user leaves; all answers.

    ``allow`` gives the model another budget, such as ``"120MiB"``, and says what came of it; None where it has no parts
    that come and go.
    """
    answers: list[Answer] = []
    known = HELP if allow is None else f"{HELP}, {MEMORY_HELP}"
    console.print_note(console.dim(known, sys.stderr))
    while True:
        try:
            prompt = input(PROMPT).strip()
        except EOFError:
            print()
            return answers
        if not prompt:
            continue
        if prompt in ("/exit", "/quit", "/bye"):
            return answers
        if prompt == "/reset":
            conversation.reset()
            console.print_note(console.dim("begun anew", sys.stderr))
            continue
        command, *words = prompt.split()
        try:
            if command == "/memory" and allow is not None and len(words) == 1:
                console.print_note(console.dim(allow(words[0]), sys.stderr))
            elif prompt.startswith("/"):
                console.print_error(f"unknown command {prompt}", known)
            else:
                answers.append(ask(prompt))
        except BarefootError as error:
            console.print_error(str(error), error.cure)
