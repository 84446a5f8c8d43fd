"""Whose threads the kernels work on: their own, or those of the OpenMP that PyTorch brought along."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import threads

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(ops.backend() == "numpy", reason="the kernels were not built")


@pytest.fixture(autouse=True)
def own_threads_again():
    before = ops.n_threads()
    yield
    ops.share_openmp(False)
    ops.set_threads(before)


def product(n_threads: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((33, 192), np.float32)
    rows = ops.blocks.encode("q4_0", rng.standard_normal((500, 192), np.float32))
    weight, out = (
        ops.PackedWeight("q4_0", 500, 192, np.ascontiguousarray(rows).reshape(-1)),
        np.empty((33, 500), np.float32),
    )
    ops.set_threads(n_threads)
    scratch = np.empty(ops.matmul_scratch_bytes(33, 192, "float32"), np.uint8)
    ops.matmul(x, [weight], [out], activations="float32", scratch=scratch)
    return out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch brings GNU's OpenMP along on Linux")
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_results_are_the_same_on_shared_threads(n_threads):
    expected = product(1)
    assert ops.share_openmp()
    for _ in range(20):
        assert np.array_equal(product(n_threads), expected)


@pytest.mark.skipif(threads.loaded_openmp() is None, reason="no GNU OpenMP is loaded")
def test_a_forked_child_has_threads_of_its_own():
    expected = product(2)
    ops.share_openmp()
    product(2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(product(2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
