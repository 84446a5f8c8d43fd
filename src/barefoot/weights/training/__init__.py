"""Training one decoder layer at a time, in PyTorch: the driver of the solvers that learn.

``layer`` is the layer's function, ``grids`` the differentiable side of the grids, ``blockwise`` the loop. They import
torch; the solvers that use them do so inside their functions.
"""
