"""The sequences of an engine: how long each is, what it can take, and how far it can be cut back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig


class Sequences:
    """Lengths of ``config.n_sequences`` sequences, all empty at first."""

    def __init__(self, spec: ModelSpec, config: EngineConfig) -> None:
        self._n, self._context, self._vocab_size = config.n_sequences, config.context, spec.vocab_size
        self._lengths = [0] * self._n
        self._highest = [0] * self._n  # positions written since the last reset: rings hold the latest of these
        windows = [(i, layer.window) for i, layer in enumerate(spec.layers)]
        self._rings = {  # window and capacity of each kind of window layer
            (window, spec.kv_positions(i, config.context, config.chunk)) for i, window in windows if window is not None
        }

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def reset(self, sequence: int) -> None:
        self._check_number(sequence)
        self._lengths[sequence] = self._highest[sequence] = 0

    def fork(self, sequence: int, into: int) -> None:
        """Have ``into`` as long as ``sequence``. Errors as in ``check_fork``."""
        self.check_fork(sequence, into)
        self._lengths[into], self._highest[into] = self._lengths[sequence], self._highest[sequence]

    def check_fork(self, sequence: int, into: int) -> None:
        """Refuse what can't be forked.

        Raises
        ------
        InvalidInput : no such sequence, or both are the same.
        """
        for number in (sequence, into):
            self._check_number(number)
        if sequence == into:
            raise InvalidInput(f"sequence {sequence} can't be forked into itself")

    def truncate(self, n: int, sequence: int) -> None:
        """Keep the first ``n`` tokens.

        Raises
        ------
        InvalidInput : ``n`` is not 0 to the length, or a window layer has already overwritten what token n would see.
        """
        self.check_truncate(n, sequence)
        if n == 0:
            self.reset(sequence)
        else:
            self._lengths[sequence] = n

    def check_truncate(self, n: int, sequence: int) -> None:
        """Raise what :meth:`truncate` would."""
        self._check_number(sequence)
        if not 0 <= n <= self._lengths[sequence]:
            raise InvalidInput(f"can keep 0 to {self._lengths[sequence]} tokens, got {n}")
        if n == 0:
            return
        highest = self._highest[sequence]
        for window, capacity in self._rings:
            if highest - capacity > max(0, n + 1 - window):
                raise InvalidInput(
                    f"can't go back from {highest} tokens to {n}: layers with a window of {window} keep "
                    f"{capacity} positions",
                    cure="reset, and prefill the kept tokens again",
                )

    def check(self, ids: Sequence[int], sequence: int) -> None:
        """Refuse ids that can't be appended: none, unknown ones, more than fit, or to a sequence that isn't there."""
        self._check_number(sequence)
        if not len(ids):
            raise InvalidInput("no tokens were given; a sequence needs at least one")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._vocab_size:
            raise InvalidInput(f"token ids must be 0 to {self._vocab_size - 1}, got {low if low < 0 else high}")
        remaining = self._context - self._lengths[sequence]
        if len(ids) > remaining:
            raise InvalidInput(
                f"{len(ids)} tokens don't fit: {remaining} of {self._context} positions are left",
                cure="shorten the prompt, or use a larger context",
            )

    def _check_number(self, sequence: int) -> None:
        if not 0 <= sequence < self._n:
            raise InvalidInput(f"sequence must be 0 to {self._n - 1}, got {sequence}")

    def highest(self, sequence: int) -> int:
        """The most tokens that the sequence has had since it was empty."""
        return self._highest[sequence]

    def restore(self, sequence: int, length: int, highest: int) -> None:
        self._check_number(sequence)
        self._lengths[sequence], self._highest[sequence] = length, highest

    def overwrite(self, grown: Mapping[int, int]) -> None:
        """So many positions of each sequence are about to be written, whether or not the pass succeeds."""
        for sequence, n in grown.items():
            self._highest[sequence] = max(self._highest[sequence], self._lengths[sequence] + n)

    def grow(self, grown: Mapping[int, int]) -> None:
        """They were written."""
        for sequence, n in grown.items():
            self._lengths[sequence] += n
