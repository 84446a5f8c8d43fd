"""Running the command as people do: in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them and their children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def barefoot() -> Callable[..., Done]:
    """``barefoot("plan", …)`` runs the command without a terminal and returns the finished process."""

    def run(*arguments: object, stdin: str = "", env: dict[str, str] | None = None) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "barefoot", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})},
            timeout=120,
        )

    return run
