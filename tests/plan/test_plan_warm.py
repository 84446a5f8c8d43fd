"""What a run's process imports: each library here takes MiB of every budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("_hashlib", "_ssl", "zipfile", "asyncio", "email", "http", "decimal", "numpy.random", "rich", "torch")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Modules of a fresh process that has found a cached model and is warm, and a hash that it makes then."""
    cache = tmp_path_factory.mktemp("cache")
    code = (
        "import json, sys; from barefoot.io.sources import aliases, resolve; from barefoot.plan.warm import warm_up\n"
        "from barefoot.core.device import cache_folder; alias = aliases()['smollm2']\n"
        "target = cache_folder() / 'models' / alias.name / alias.file\n"
        "target.parent.mkdir(parents=True); target.write_bytes(b'x'); assert resolve('smollm2') == target\n"
        "import barefoot.cli.main; barefoot.cli.main.build_parser(); warm_up(); found = sorted(sys.modules)\n"
        "import hashlib, _hashlib\n"
        "json.dump({'modules': found, 'sha256': hashlib.sha256(b'abc').hexdigest()}, sys.stdout)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "BAREFOOT_CACHE": str(cache), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", HEAVY)
def test_a_run_does_not_import(loaded: dict[str, object], name: str):
    modules = loaded["modules"]
    assert isinstance(modules, list)
    assert {"jinja2.sandbox", "tokenizers"} <= set(modules)
    assert name not in modules


def test_hashes_still_work(loaded: dict[str, object]):
    assert loaded["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
