"""PyTorch's AdamW, and how its moments are saved, restored and let go of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

F32 = npt.NDArray[np.float32]
Moment = Literal["first", "second"]
_KEYS: Mapping[Moment, str] = {"first": "exp_avg", "second": "exp_avg_sq"}  # as PyTorch calls them


class AdamW(torch.optim.AdamW):
    """Array by array: not foreach, which holds one more copy of all of it during a step."""

    def __init__(self, parameters: Sequence[Tensor], **rule: Any) -> None:
        super().__init__(parameters, lr=0.0, foreach=False, fused=False, **rule)

    def moments(self, parameter: Tensor) -> Mapping[Moment, Iterable[F32]]:
        """What is remembered of a parameter, in its order, in pieces; nothing before its first step."""
        state = self.state.get(parameter, {})
        return {moment: (state[key].numpy(),) for moment, key in _KEYS.items() if key in state}

    def restore(self, parameter: Tensor, step: int, moments: Mapping[Moment, F32]) -> None:
        """Go on as behind ``step`` steps; moments have the parameter's shape."""
        state = {key: torch.from_numpy(moments[moment]) for moment, key in _KEYS.items()}
        self.state[parameter] = {"step": torch.tensor(float(step)), **state}

    def keep(self, parameter: Tensor, rows: slice) -> None:
        """Of a parameter that has lost some rows, remember only those that it still has."""
        state = self.state.get(parameter, {})
        for key in _KEYS.values():
            if key in state:
                state[key] = state[key][rows].clone()

    def forget(self, parameter: Tensor) -> None:
        """It doesn't learn any more."""
        self.state.pop(parameter, None)
