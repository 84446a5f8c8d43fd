"""The progress line must never take away what was printed after it."""

import io
import sys

import pytest

from barefoot.cli import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def at_terminal(monkeypatch):
    """A terminal as standard error; set in the test itself, since pytest sets its own before."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0)
    return stream


def test_it_is_cleared_when_all_is_done(monkeypatch):
    terminal = at_terminal(monkeypatch)
    with progress.line() as report:
        report(1, 2, "reading")
        assert terminal.getvalue() == "\r\033[Kreading 50%"
        report(2, 2, "reading")
        before = terminal.getvalue()
        terminal.write("the answer")
    assert before == "\r\033[Kreading 50%\r\033[K"
    assert terminal.getvalue() == before + "the answer"


def test_it_is_cleared_when_interrupted(monkeypatch):
    terminal = at_terminal(monkeypatch)

    def fetch():
        with progress.line() as report:
            report(1, None, "fetching")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert terminal.getvalue() == "\r\033[Kfetching\r\033[K"


def test_nothing_without_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for make in (progress.line, progress.bar):
        with make() as report:
            report(1, 2, "reading")
    assert stream.getvalue() == ""


def test_bars_of_rich_disappear(monkeypatch):
    terminal = at_terminal(monkeypatch)
    with progress.bar() as report:
        report(1 << 20, 1 << 21, "fetching")
    assert "fetching" in terminal.getvalue()
    assert terminal.getvalue().endswith("\033[2K")
