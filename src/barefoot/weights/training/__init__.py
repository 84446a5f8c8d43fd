"""Training one decoder layer at a time, in PyTorch: the driver of the solvers that learn.

``layer`` is the layer's function, ``grids`` the differentiable side of the grids, ``blockwise`` the loop. ``lsq``
trains any modules instead, with steps that learn; ``modules`` puts rounded weights in their place. All of them import
torch; the solvers that use them do so inside their functions.
"""

import importlib.util

from barefoot.core.errors import BackendMissing

TILE = 1 << 16  # weights that are rounded at a time, so that what lies between stays in the cache


def require_torch(what: str) -> None:
    """
    Raises
    ------
    BackendMissing : PyTorch is not installed, which ``what`` learns with.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendMissing(f"{what} learns with PyTorch, which is not installed", cure="pip install torch")
