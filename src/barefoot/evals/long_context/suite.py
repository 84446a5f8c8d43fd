"""All tasks at one length: made once from a text, answered by any number of caches, summed up beside the full one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from barefoot.evals.long_context.continuation import Passage, passages
from barefoot.evals.long_context.copying import copying
from barefoot.evals.long_context.drivers import Driver, Fork
from barefoot.evals.long_context.facts import WORDING, Wording, needle, shared_context
from barefoot.evals.long_context.key_value import key_value
from barefoot.evals.long_context.prompts import Form
from barefoot.evals.long_context.reach import Reach, reach
from barefoot.evals.long_context.sessions import Answer, Session, apart, in_turn

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

Cells = Mapping[tuple[str, str], list[Answer]]  # (task, depth or turn) → answers


@dataclass(frozen=True)
class Size:
    """How much of each task: sessions of each kind (needles: at each depth), and what one holds."""

    n_needles: int = 2
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    n_lists: int = 2
    n_shared: int = 3
    n_facts: int = 4
    n_copies: int = 2
    n_passages: int = 4
    n_scored: int = 128  # tokens along each passage


SMALL = Size()


@dataclass(frozen=True)
class Suite:
    """Prompts of at most ``n_tokens``. Copies have a quarter as many words, since each is fed twice, singly."""

    n_tokens: int
    needles: tuple[Session, ...]
    lists: tuple[Session, ...]
    shared: tuple[Session, ...]
    copies: tuple[Session, ...]
    passages: tuple[Passage, ...]


def suite(
    text: str,
    tokenizer: Tokenizer,
    form: Form,
    n_tokens: int,
    seed: int = 0,
    size: Size = SMALL,
    wording: Wording = WORDING,
) -> Suite:
    """The same from the same arguments. Errors as the tasks' own builders."""
    seeds = range(1000 * seed, 1000 * (seed + 1))  # of sessions; the tasks draw different things from the same seed
    return Suite(
        n_tokens,
        needles=tuple(
            needle(text, tokenizer, form, n_tokens, depth, seeds[i * size.n_needles + k], wording)
            for i, depth in enumerate(size.depths)
            for k in range(size.n_needles)
        ),
        lists=tuple(key_value(tokenizer, n_tokens, size.depths, s) for s in seeds[: size.n_lists]),
        shared=tuple(
            shared_context(text, tokenizer, form, n_tokens, size.n_facts, s, wording) for s in seeds[: size.n_shared]
        ),
        copies=tuple(copying(tokenizer, n_tokens // 4, s) for s in seeds[: size.n_copies]),
        passages=tuple(passages(text, tokenizer, n_tokens, size.n_scored, size.n_passages)),
    )


def answers(driver: Driver, suite: Suite, fork: Fork | None = None, *, stepwise: bool = True) -> Cells:
    """What a cache answers: needles and lists by depth, facts in a shared context by turn and each apart, copies.

    ``fork`` as in :func:`.sessions.apart`; ``stepwise`` as in :func:`.drivers.feed`.
    """
    found: dict[tuple[str, str], list[Answer]] = {}
    for session in suite.needles:
        (answer,) = in_turn(driver, session, stepwise=stepwise)
        found.setdefault(("needle", f"depth {session.turns[0].depth}"), []).append(answer)
    for session in suite.lists:
        for turn, answer in zip(session.turns, apart(driver, session, fork, stepwise=stepwise), strict=True):
            found.setdefault(("key_value", f"depth {turn.depth}"), []).append(answer)
    for session in suite.shared:
        for number, answer in enumerate(in_turn(driver, session, stepwise=stepwise), 1):
            found.setdefault(("in_turn", f"turn {number}"), []).append(answer)
        for number, answer in enumerate(apart(driver, session, fork, stepwise=stepwise), 1):
            found.setdefault(("apart", f"turn {number}"), []).append(answer)
    for session in suite.copies:
        found.setdefault(("copy", "all"), []).extend(in_turn(driver, session, stepwise=stepwise))
    return found


def by_task(cells: Cells, full: Cells) -> dict[str, dict[str, Reach]]:
    """Task → each depth or turn, and ``all`` of them → what was reached, beside the same of the full cache."""
    found: dict[str, dict[str, Reach]] = {}
    for (task, where), here in cells.items():
        found.setdefault(task, {})[where] = reach(here, full[task, where])
    for task, inside in found.items():
        inside["all"] = reach(list(_of(task, cells)), list(_of(task, full)))
    return found


def _of(task: str, cells: Cells) -> Iterable[Answer]:
    return chain.from_iterable(answers for (name, _), answers in cells.items() if name == task)
