"""KV placement: where in memory a store's rows lie, and from when on they take any.

A store states tensors (:mod:`barefoot.kv.placement.geometry`); without a placement all their bytes are resident from
the start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from barefoot.core.ledger import Term
from barefoot.core.technique import Technique
from barefoot.kv.placement.cache import VirtualCache
from barefoot.kv.placement.geometry import VirtualTensor
from barefoot.kv.placement.pages import Pages


class Placement(Technique):
    """The role: which bytes of a store's addresses are memory, and when. Ranges of rows start on multiples of
    ``page_bytes``."""

    page_bytes: int

    @abstractmethod
    def terms(self, tensors: Sequence[VirtualTensor], n_slots: int) -> tuple[Term, ...]:
        """The most bytes that the tensors of ``n_slots`` sequences ever take at once.

        Raises
        ------
        OverBudget : not even one token fits in what the placement may take.
        """

    @abstractmethod
    def open(self, tensors: Sequence[VirtualTensor], n_slots: int, pages: Pages) -> VirtualCache:
        """Reserve the tensors' addresses in ``pages``, which close with the cache.

        Raises
        ------
        OverBudget : as in :meth:`terms`, or ``pages`` have not so much memory.
        InvalidInput, Incompatible : pages or addresses that the system does not have.
        """


ROLE = Placement
