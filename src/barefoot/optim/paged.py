"""paged — AdamW whose moments lie in a file, some pages of them in memory.

The paged optimizer of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3). The moments of all arrays, one behind
the other, are cut into pages; a page has the first moments of ``page`` KiB / 8 numbers, then their second ones. A step
goes from page to page and updates the numbers of each while a second thread writes the page that was not used for the
longest time to the file and reads the next. Every other step goes backwards, so that it begins with the pages that the
one before left in memory. Weights are those of ``adamw``, bit for bit.

Bytes in memory: the pages that ``resident`` MiB hold, and one that is on its way; during a step two numbers of 4 bytes
for each of a page. On disk: 8 a number that learns. A step reads and writes what isn't in memory.

Differs from the paper: pages are ours, in a file, where it has CUDA's unified memory, which moves them between the GPU
and the host when there is need. The file has no name, so that nothing is left of it behind a kill; what it holds is in
the training's state. In a folder that lies in memory (tmpfs) it saves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.optim import Optimizer


@dataclass(frozen=True)
class PagedAdam(Optimizer, name="paged", papers=(90,)):
    resident: int = 4  # MiB
    page: int = 256  # KiB

    def __post_init__(self) -> None:
        if self.page < 4 or self.page % 4:
            raise InvalidInput(f"paged: page must be a multiple of 4 KiB, got {self.page}")
        if self.resident < 1 or self.resident << 10 < self.page:
            raise InvalidInput(f"paged: resident must be at least a page, {self.page} KiB, got {self.resident} MiB")

    @property
    def page_bytes(self) -> int:
        return self.page << 10

    def _pages(self, sizes: Sequence[int]) -> tuple[int, int]:
        """In all, and those that stay in memory."""
        n = -(-8 * sum(sizes) // self.page_bytes)
        return n, min(n, (self.resident << 20) // self.page_bytes)

    def state_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        n, stay = self._pages(sizes)
        moving = Term("a page on its way", min(1, n - stay), self.page_bytes)
        return Term("pages of moments", stay, self.page_bytes), moving

    def step_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        return (Term("a step of a page's numbers", 2 * min(max(sizes), self.page_bytes // 8), 4),)

    def moved_bytes(self, sizes: Sequence[int]) -> int:
        n, stay = self._pages(sizes)
        return 2 * (n - stay) * self.page_bytes

    def over(self, parameters: Sequence[Any], folder: Path, **rule: Any) -> Any:
        from barefoot.optim.driver.paged import PagedAdamW

        return PagedAdamW(parameters, folder, self.page_bytes, self.resident << 20, **rule)
