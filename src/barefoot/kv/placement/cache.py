"""The memory of a store's slots: what :mod:`barefoot.kv.placement.slots` decides, done to pages, partly by a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from barefoot.kv.placement.geometry import Change, Geometry
from barefoot.kv.placement.pages import Pages
from barefoot.kv.placement.slots import Slots

if TYPE_CHECKING:
    from concurrent.futures import Future


class VirtualCache:
    """The memory of a store's slots, committed as they grow.

    Attributes
    ----------
    n_waited, n_ahead, n_released : pages that steps committed, that the thread did meanwhile, and that were given back.
    """

    def __init__(self, slots: Slots, pages: Pages, *, background: bool) -> None:
        from concurrent.futures import ThreadPoolExecutor  # only runs that commit as they go need it

        self._slots, self._pages = slots, pages
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="barefoot-pages") if background else None
        self._ahead: Future[None] | None = None
        self.n_waited = self.n_ahead = self.n_released = 0

    @property
    def geometry(self) -> Geometry:
        return self._slots.geometry

    @property
    def committed_bytes(self) -> int:
        """Of memory now, once the thread is done."""
        self._settle()
        return self._pages.committed_bytes

    def alloc(self, n_tokens: int) -> int:
        """An idle slot for a sequence that starts with ``n_tokens``; the step commits its pages. Errors as in
        :meth:`Slots.alloc`."""
        self._settle()
        return self._slots.alloc(n_tokens)

    def free(self, slot: int) -> None:
        """The slot's sequence has ended; its contents are lost."""
        self._settle()
        self._make(self._slots.free(slot))

    def step(self, lengths: Sequence[int]) -> None:
        """Commit what ``lengths`` tokens of each slot need, this step's among them, and let the thread look ahead.

        Raises
        ------
        PoolExhausted : the pool is too small for them; all is as before.
        OverBudget : the system has no memory left, now or when the thread asked for it.
        """
        self._settle()
        self.n_waited += self._make(self._slots.step(lengths))
        if self._thread is not None:
            self._ahead = self._thread.submit(self._look_ahead)

    def trim(self) -> None:
        """Give back all pages beyond the present tokens."""
        self._settle()
        self._make(self._slots.trim())

    def close(self) -> None:
        """Wait for the thread, end it, and give back all memory."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._pages.close()

    def _settle(self) -> None:
        """Wait for the thread, which has the slots to itself until it is done; its error is raised here, once."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def _look_ahead(self) -> None:
        self.n_ahead += self._make(self._slots.ahead())

    def _make(self, changes: Sequence[Change]) -> int:
        """Make the changes, in their order; how many pages were committed."""
        n_committed = 0
        for change in changes:
            spans = list(self.geometry.spans(change.slot, change.first, change.stop))
            n_pages = sum(size for _, size in spans) // self.geometry.page_bytes
            if change.commit:
                self._commit(spans)
                n_committed += n_pages
            else:
                for span in spans:
                    self._pages.release(*span)
                self.n_released += n_pages
            self._slots.apply(change)
        return n_committed

    def _commit(self, spans: Sequence[tuple[int, int]]) -> None:
        """All of them, or none and an error."""
        for i, span in enumerate(spans):
            try:
                self._pages.commit(*span)
            except BaseException:
                for done in spans[:i]:
                    self._pages.release(*done)
                raise
