"""AdamW over moments in pages."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from barefoot.optim.driver.adamw import F32, Moment
from barefoot.optim.driver.pager import Pager


@dataclass(frozen=True)
class _Part:
    """Numbers of a parameter whose moments a page holds: ``n`` from ``first`` on, in the page from ``at`` on."""

    parameter: Tensor
    first: int
    at: int
    n: int


class PagedAdamW(torch.optim.Optimizer):
    """The same weights as ``AdamW`` and its methods; :mod:`barefoot.optim.paged` says how.

    Parameters
    ----------
    parameters : float32, contiguous, on the host.
    folder : where the file of pages lies.
    page_bytes, resident_bytes : of a page, and of those that stay in memory; one more is on its way.
    rule : ``betas``, ``eps`` and ``weight_decay``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], folder: Path, page_bytes: int, resident_bytes: int, **rule: Any
    ) -> None:
        super().__init__(parameters, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, **rule})
        learned = self.param_groups[0]["params"]
        self._per_page = page_bytes // 8
        ends = list(itertools.accumulate((p.numel() for p in learned), initial=0))
        self._begin = dict(zip(learned, ends, strict=False))  # of each parameter's numbers among all
        n_pages = -(-ends[-1] // self._per_page)
        self.pager = Pager(folder, n_pages, page_bytes, resident_bytes // page_bytes + 1)
        weakref.finalize(self, self.pager.close)
        self._backwards = False
        self._divide()

    def _divide(self) -> None:
        """Note which numbers each page has."""
        self._parts: dict[int, list[_Part]] = {}
        for parameter, begin in self._begin.items():
            for first, page, at, n in self._pieces(begin, parameter.numel()):
                self._parts.setdefault(page, []).append(_Part(parameter, first, at, n))

    def _pieces(self, begin: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """First number, page, place in the page and how many, of ``length`` numbers from number ``begin`` of all on."""
        done = 0
        while done < length:
            page, at = divmod(begin + done, self._per_page)
            n = min(self._per_page - at, length - done)
            yield done, page, at, n
            done += n

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        group, learned = self.param_groups[0], [p for p in self._begin if p.grad is not None]
        pages = sorted(page for page, parts in self._parts.items() if any(x.parameter.grad is not None for x in parts))
        if self._backwards:
            pages.reverse()
        self._backwards = not self._backwards
        for page, ahead in itertools.zip_longest(pages, pages[1:]):
            with self.pager.page(page, changes=True, ahead=ahead) as held:
                moments = torch.from_numpy(held.view(np.float32).reshape(2, -1))
                for part in self._parts[page]:
                    if part.parameter.grad is not None:
                        self._update(part, part.parameter.grad, moments[:, part.at : part.at + part.n], group)
        for parameter in learned:
            self.state[parameter]["step"] = self._steps(parameter) + 1

    def _steps(self, parameter: Tensor) -> int:
        return self.state[parameter].get("step", 0)

    def _update(self, part: _Part, grad: Tensor, moments: Tensor, group: Mapping[str, Any]) -> None:
        some, (first, second) = slice(part.first, part.first + part.n), moments
        values, step = part.parameter.view(-1)[some], torch.tensor(float(self._steps(part.parameter)))
        beta1, beta2 = group["betas"]
        adamw(
            [values], [grad.reshape(-1)[some]], [first], [second], [], [step],
            foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _remembered(self, parameter: Tensor, *, changes: bool) -> Iterator[tuple[slice, F32]]:
        """Which numbers, and their moments float32 (2, n), page by page."""
        for first, page, at, n in self._pieces(self._begin[parameter], parameter.numel()):
            with self.pager.page(page, changes=changes) as held:
                yield slice(first, first + n), held.view(np.float32).reshape(2, -1)[:, at : at + n]

    def moments(self, parameter: Tensor) -> Mapping[Moment, Iterator[F32]]:
        if not self._steps(parameter):
            return {}
        return {
            "first": (found[0] for _, found in self._remembered(parameter, changes=False)),
            "second": (found[1] for _, found in self._remembered(parameter, changes=False)),
        }

    def restore(self, parameter: Tensor, step: int, moments: Mapping[Moment, F32]) -> None:
        first, second = (moments[moment].reshape(-1) for moment in ("first", "second"))
        for some, found in self._remembered(parameter, changes=True):
            found[0], found[1] = first[some], second[some]
        self.state[parameter]["step"] = step

    def keep(self, parameter: Tensor, rows: slice) -> None:
        """Those rows keep their place in the pages; what lies around them is not used any more."""
        if len(parameter):
            self._begin[parameter] += (rows.start or 0) * parameter[0].numel()
        self._divide()

    def forget(self, parameter: Tensor) -> None:
        self._begin.pop(parameter, None)
        self.state.pop(parameter, None)
        self._divide()
