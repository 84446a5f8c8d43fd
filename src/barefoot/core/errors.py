"""Exceptions by cause. Each carries the exit code that the command line returns and, where known, the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BarefootError(Exception):
    """Base of every error that barefoot raises on purpose.

    Parameters
    ----------
    message : what happened, with got and expected.
    cure : what the user can do about it, in the imperative; printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__(message)
        self.cure = cure

    @property
    def name(self) -> str:
        return type(self).__name__


class InvalidInput(BarefootError):
    """A value that the user gave can't be read or lies outside its range."""

    exit_code = 2


class OverBudget(BarefootError):
    """The job does not fit the stated memory; raised before anything large is allocated.

    ``needed`` and ``available`` are bytes; ``refusal`` is the planner's full answer, if it made one.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, needed: int, available: int, refusal: object = None, cure: str | None = None
    ) -> None:
        super().__init__(message, cure=cure)
        self.needed = needed
        self.available = available
        self.refusal = refusal


class Incompatible(BarefootError):
    """Two techniques, or a technique and a model, can't be used together; the message says why."""

    exit_code = 4


class UnsupportedFormat(BarefootError):
    """The file is sound, but holds a type, an architecture or a version that barefoot does not know."""

    exit_code = 5


class CorruptFile(BarefootError):
    """The file contradicts itself or its own size."""

    exit_code = 6


class BackendMissing(BarefootError):
    """An optional library or a compiled part is not installed."""

    exit_code = 7


class SourceNotFound(BarefootError):
    """No model, file or package under that name, or it could not be fetched."""

    exit_code = 8


def unknown_name(what: str, got: str, known: Iterable[str]) -> InvalidInput:
    """The error for a name that is not among ``known``: the nearest ones first, then all of them, sorted."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=3)
    cure = f"did you mean {' or '.join(near)}?" if near else None
    return InvalidInput(f"unknown {what} {got!r}; known: {', '.join(names)}", cure=cure)
