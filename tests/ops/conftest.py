import numpy as np
import pytest

from barefoot import ops


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(params=ops.available_isas())
def isa(request):
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture
def threads():
    """``set_threads``, undone after the test."""
    before = ops.n_threads()
    yield ops.set_threads
    ops.set_threads(before)
