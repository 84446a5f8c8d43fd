"""One source for numpy arrays and torch tensors.

The quantizers of this family use functions that both libraries know under the same names and arguments
(``amax(x, axis=1)``, ``where``, ``round`` half to even), so the caller's arrays say which of them is meant.
"""

from __future__ import annotations

import sys
from typing import Any

Array = Any  # a numpy array or a torch tensor


def namespace(array: Array) -> Any:
    """The module whose functions work on ``array``: numpy, or torch, which is never imported for it."""
    return sys.modules[type(array).__module__.partition(".")[0]]
