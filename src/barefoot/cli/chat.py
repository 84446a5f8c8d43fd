"""The chat of ``barefoot run``: turns at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from barefoot.cli import console
from barefoot.cli.conversation import Answer, Conversation
from barefoot.core.errors import BarefootError

PROMPT = "> "
HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def prepare() -> None:
    """Import what line editing needs, before a run measures what is reserved."""
    try:
        import readline  # noqa: F401  (input() uses it when it is there)
    except ImportError:
        return


def chat(conversation: Conversation, ask: Callable[[str], Answer]) -> list[Answer]:
    """Ask for prompts until the user leaves; all answers."""
    answers: list[Answer] = []
    console.print_note(console.dim(HELP, sys.stderr))
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
        if prompt.startswith("/"):
            console.print_error(f"unknown command {prompt.split()[0]}", HELP)
            continue
        try:
            answers.append(ask(prompt))
        except BarefootError as error:
            console.print_error(str(error), error.cure)
