"""Training inside a budget: data, losses, schedules and bytes; all that needs PyTorch is in ``train.driver``.

A micro-batch is one stream of N tokens of whole documents, without padding: their ids, for each token the one that it
is to predict (:data:`NOTHING` where it predicts none), and the documents' lengths. Attention sees a token's own
document, and positions begin in each anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NOTHING = -100  # the label of a token that predicts nothing, as in PyTorch

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """
    Attributes
    ----------
    ids : int64 (N,).
    labels : int64 (N,), of each token the next one of its document, or ``NOTHING``.
    lengths : of the documents, N in all.
    taught : what a teacher makes of them, a ``Taught`` of the driver, for a loss that imitates one.
    """

    ids: I64
    labels: I64
    lengths: tuple[int, ...]
    taught: Any = None

    @property
    def n_predicted(self) -> int:
        return int((self.labels != NOTHING).sum())
