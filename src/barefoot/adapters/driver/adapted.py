"""What a module with an adapter is to the decoder, the training loop and its state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from barefoot.adapters.files import Pair


class AdaptedLinear(nn.Module):
    """A frozen product with what learns beside it: ``forward(x)`` multiplies by both."""

    #: Whether the next pass is for its gradients alone, so that what it returns may be anything.
    only_for_gradients = False

    @property
    @abstractmethod
    def learned(self) -> Mapping[str, nn.Parameter]:
        """What learns, by the letters that follow the matrix's name."""

    @property
    def settled(self) -> Mapping[str, Tensor]:
        """What has learned, and no longer does; the same way."""
        return {}

    def advance(self, step: int, steps: int) -> Mapping[str, slice]:
        """Have only that learn which is to behind ``step`` of ``steps``: a parameter keeps being the same one, with
        fewer rows. Which of its rows are left, by letter, of those that lost some."""
        return {}

    @abstractmethod
    def pair(self) -> Pair:
        """What it adds to the matrix as the model's file has it."""
