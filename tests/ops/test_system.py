"""Files, pages, threads and the choice of instruction sets."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import barefoot
from barefoot import ops
from barefoot.core.errors import BackendMissing, InvalidInput

SOURCE = Path(barefoot.__file__).parent.parent


def run_python(code, **environment):
    """The standard output of ``code`` in a fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "BAREFOOT_ISA"} | {"PYTHONPATH": str(SOURCE)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_read_at_reads_that_range(tmp_path, rng):
    content = rng.integers(0, 256, 100_000, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    array = np.zeros(50_000, np.uint8)
    with path.open("rb") as file:
        ops.read_at(file.fileno(), 12_345, array)
        assert np.array_equal(array, content[12_345:62_345])
        with pytest.raises(OSError, match="ends after 10000 of 50000 bytes at offset 90000"):
            ops.read_at(file.fileno(), 90_000, array)
    with pytest.raises(OSError):
        ops.read_at(10_000, 0, array)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is a Linux flag")
def test_read_at_past_the_page_cache(tmp_path, rng):
    content = rng.integers(0, 256, 1 << 16, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without direct access, as tmpfs was: the same bytes through the cache
        fd = os.open(path, os.O_RDONLY)
    array = np.frombuffer(mmap.mmap(-1, 1 << 15), np.uint8)
    ops.read_at(fd, 1 << 14, array)
    os.close(fd)
    assert np.array_equal(array, content[1 << 14 : (1 << 14) + (1 << 15)])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident pages are read from /proc")
def test_populate_makes_pages_resident_and_keeps_their_contents():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    size = 64 << 20
    array = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    array[1000:1010] = 7
    before = resident()
    ops.populate(array[100:])
    assert size * 0.98 <= resident() - before <= size * 1.05
    assert array[1000:1010].tolist() == [7] * 10
    assert not array[1010:].any()


def test_threads_are_checked(threads):
    threads(3)
    assert ops.n_threads() == 3
    for wrong in (0, -1, 257):
        with pytest.raises(InvalidInput):
            threads(wrong)
    assert ops.n_threads() == 3


BUSY = """
import os, time, numpy as np
from barefoot import ops
from barefoot.ops import blocks
def product():
    w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    weight = ops.PackedWeight("int4_g32_sym", 512, 512, blocks.encode("int4_g32_sym", w))
    x, out = np.ones((8, 512), np.float32), np.empty((8, 512), np.float32)
    ops.matmul(x, [weight], [out], scratch=np.empty(ops.matmul_scratch_bytes(8, 512), np.uint8))
    return out.tobytes()
ops.set_threads(3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only some systems fork")
def test_a_forked_child_gets_its_own_threads():
    code = BUSY + (
        "first = product()\nread, write = os.pipe()\n"
        "if os.fork() == 0:\n    os.write(write, b'same' if product() == first else b'diff')\n    os._exit(0)\n"
        "os.wait(); print(os.read(read, 4).decode())"
    )
    assert run_python("import warnings; warnings.simplefilter('ignore')\n" + code) == "same"


def test_idle_threads_use_no_processor_time():
    code = BUSY + "product(); start = time.process_time(); time.sleep(0.4); print(time.process_time() - start)"
    assert float(run_python(code)) < 0.05


def test_threads_from_several_python_threads():
    code = BUSY + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n    results = list(pool.map(lambda _: product(), range(40)))\n"
        "print(len(set(results)))"
    )
    assert run_python(code) == "1"


def test_the_environment_chooses_the_instruction_set():
    show = "from barefoot import ops; print(ops.backend())"
    assert run_python(show, BAREFOOT_ISA="portable") == "native:portable"
    assert run_python(show) == f"native:{ops.available_isas()[-1]}"


def test_unknown_and_missing_instruction_sets_are_refused():
    with pytest.raises(InvalidInput, match="avx512-vnni"):
        ops.set_isa("avx512vnni")
    missing = next(name for name in ("neon", "avx2") if name not in ops.available_isas())
    with pytest.raises(BackendMissing) as refused:
        ops.set_isa(missing)
    assert "portable" in refused.value.cure


def test_without_kernels_numpy_takes_over():
    code = "import sys; sys.modules['barefoot.ops._native'] = None\n" + BUSY + "product(); print(ops.backend())"
    assert run_python(code) == "reference:numpy"


def test_importing_the_ops_stays_light():
    code = "import sys; from barefoot import ops; print({'torch', 'jinja2', 'tokenizers'} & set(sys.modules))"
    assert run_python(code) == "set()"
