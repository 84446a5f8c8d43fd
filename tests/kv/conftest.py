import pytest

from barefoot import ops


@pytest.fixture(params=ops.available_isas())
def isa(request):
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)
