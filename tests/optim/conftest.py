"""What tests of optimizers share."""

import pytest


@pytest.fixture
def one_torch_thread():
    """Arrays as small as the tests' only wait for a second one."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
