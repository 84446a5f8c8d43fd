"""The 92 papers and what of each is here, read from ``papers.toml`` beside this file."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from barefoot.core.errors import InvalidInput
from barefoot.core.technique import Status

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Paper:
    """One paper; the fields are documented at the head of ``papers.toml``."""

    number: int
    title: str
    home: str
    status: Status
    techniques: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    claim: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data, tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


@functools.cache
def all_papers() -> tuple[Paper, ...]:
    """Every paper, by number."""
    rows: list[dict[str, Any]] = tomllib.loads(files("barefoot").joinpath("papers.toml").read_text("utf-8"))["paper"]
    return tuple(map(_from_row, rows))


def _from_row(row: dict[str, Any]) -> Paper:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Paper(**fields)


def paper(number: int) -> Paper:
    """The paper of that number.

    Raises
    ------
    InvalidInput : there is none.
    """
    papers = {p.number: p for p in all_papers()}
    if number not in papers:
        raise InvalidInput(f"there is no paper {number}; they are numbered {min(papers)} to {max(papers)}")
    return papers[number]
