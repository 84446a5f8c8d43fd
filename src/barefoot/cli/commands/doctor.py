"""``barefoot doctor``: what this machine and this installation offer."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from barefoot.cli import console
from barefoot.core.units import format_bytes

HELP = "say what this machine and this installation offer: kernels, memory, speeds, libraries"
EXAMPLES = ("barefoot doctor", "barefoot doctor --refresh", "barefoot doctor --devices")
JSON_KEYS = {
    "versions": "of barefoot, Python and the libraries that it uses; null for optional ones that are missing",
    "system": "operating system and processor",
    "kernels": "backend: what computes, compiled kernels or numpy; available: instruction sets to choose from",
    "layouts": "fastest layout for decoding by bits of a code and size of a matrix, with seconds; null if not measured",
    "threads": "logical cores that may be used",
    "memory": "total_bytes, available_bytes, cgroup_limit_bytes, each with where it comes from",
    "speeds": "bandwidths and arithmetic, each with where it comes from",
    "reserved": "bytes that a run's process has resident before it does anything, and where the number comes from",
    "cache": "folder of models, its bytes, and the bytes free on that disk",
    "devices": "with --devices: the table of machines that plans can be made for",
}
LIBRARIES = ("numpy", "tokenizers", "jinja2", "rich")
OPTIONAL_LIBRARIES = ("huggingface_hub", "safetensors", "gguf", "torch", "transformers", "llama-cpp-python")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refresh", action="store_true", help="measure this machine again (some seconds)")
    parser.add_argument("--devices", action="store_true", help="list the machines that `plan --device` knows")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import platform

    from barefoot import __version__, ops
    from barefoot.core import device
    from barefoot.plan.reserved import reserved_expected

    this = device.this_machine()
    total, total_source = device.total_memory()
    available, available_source = device.available_memory()
    reserved = reserved_expected()
    versions: dict[str, str | None] = {"barefoot": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*LIBRARIES, *OPTIONAL_LIBRARIES)}
    speeds = {
        "memory reads": (this.read_gb_s["host"], "GB/s", this.source("read_gb_s.host")),
        "disk reads": (this.read_gb_s["disk"], "GB/s", this.source("read_gb_s.disk")),
        "arithmetic, f32": (this.peaks["f32"] / 1e9, "Gop/s", this.source("peaks.f32")),
        "arithmetic, int8": (this.peaks["int8"] / 1e9, "Gop/s", this.source("peaks.int8")),
    }
    return {
        "versions": versions,
        "system": {"platform": platform.platform(), "processor": this.title, "cores": this.n_cores},
        "kernels": {"backend": ops.backend(), "available": list(ops.available_isas())},
        "layouts": _layouts(),
        "threads": this.n_threads,
        "memory": {
            "total_bytes": total,
            "total_source": total_source,
            "available_bytes": available,
            "available_source": available_source,
            "cgroup_limit_bytes": device.memory_limit(),
        },
        "speeds": {name: {"value": v, "unit": unit, "source": source} for name, (v, unit, source) in speeds.items()},
        "reserved": {"bytes": reserved.bytes, "source": reserved.source},
        "cache": _cache(),
    }


def _layouts() -> dict[str, Any] | None:
    """Kind → size → the fastest layout, and the seconds of each."""
    from barefoot.ops import dispatch

    table = dispatch.cached()
    if table is None:
        return None
    return {
        f"{kind[0]} bits{', no minimums' if kind.endswith('-sym') else ''}": {
            size: {"fastest": min(each, key=each.__getitem__), "seconds": each} for size, each in sizes.items()
        }
        for kind, sizes in table["seconds"].items()
    }


def _cache() -> dict[str, Any]:
    import shutil

    from barefoot.core.device import cache_folder

    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return {"folder": str(folder), "bytes": used, "free_bytes": shutil.disk_usage(existing).free}


def _print_machine(facts: dict[str, Any]) -> None:
    memory, cache, kernels = facts["memory"], facts["cache"], facts["kernels"]
    limit = memory["cgroup_limit_bytes"]
    rows = [
        ("barefoot", facts["versions"]["barefoot"] + ", Python " + facts["versions"]["python"]),
        ("system", facts["system"]["platform"]),
        ("processor", f"{facts['system']['processor']}, {facts['system']['cores']} cores"),
        ("kernels", f"{kernels['backend']}; here are {', '.join(kernels['available'])}"),
        ("threads", str(facts["threads"])),
        ("memory", f"{format_bytes(memory['total_bytes'])} ({memory['total_source']})"),
        ("available", f"{format_bytes(memory['available_bytes'])} ({memory['available_source']})"),
        ("cgroup limit", format_bytes(limit) if limit else "none"),
        *((name, f"{s['value']:,.1f} {s['unit']} ({s['source']})") for name, s in facts["speeds"].items()),
        ("reserved", f"{format_bytes(facts['reserved']['bytes'])} ({facts['reserved']['source']})"),
        ("cache", f"{cache['folder']}: {format_bytes(cache['bytes'])}, {format_bytes(cache['free_bytes'])} free"),
        ("libraries", ", ".join(f"{name} {facts['versions'][name]}" for name in LIBRARIES)),
        ("optional", ", ".join(f"{name} {facts['versions'][name] or '(missing)'}" for name in OPTIONAL_LIBRARIES)),
    ]
    print(console.table([(console.bold(name, sys.stdout), text) for name, text in rows]))
    if facts["layouts"]:
        _print_layouts(facts["layouts"])


def _print_layouts(layouts: dict[str, Any]) -> None:
    """Microseconds of one token by layout, the fastest first."""
    rows = []
    for kind, sizes in layouts.items():
        cells = [sorted(each["seconds"].items(), key=lambda item: item[1]) for each in sizes.values()]
        rows.append((kind, *(", ".join(f"{name} {1e6 * s:,.0f}" for name, s in cell) for cell in cells)))
    print("\nlayouts: µs for a matrix and one token, fastest first")
    print(console.table(rows, header=("codes", *(f"{size} matrix" for size in next(iter(layouts.values()))))))


def _print_devices(devices: list[dict[str, Any]]) -> None:
    rows = []
    for d in devices:
        place = "accelerator" if d["n_accelerators"] else "host"
        source = d["sources"].get("*", "") + ("" if d["checked"] else " (not checked)")
        memory, speed = format_bytes(d["memory_bytes"][place]), f"{d['read_gb_s'][place]:,.0f}"
        rows.append((d["name"], d["title"], memory, speed, source))
    print(console.table(rows, header=("name", "machine", "memory", "GB/s", "source"), right=(2, 3)))


def execute(args: argparse.Namespace) -> int:
    from barefoot.core.device import cached_probe, known_devices
    from barefoot.ops import dispatch

    if args.devices:
        facts: dict[str, Any] = {"devices": [device.to_json() for device in known_devices().values()]}
    else:
        if args.refresh or cached_probe() is None:
            from barefoot.core.probe import probe

            console.print_note("measuring this machine …")
            probe()
        if args.refresh or dispatch.cached() is None:
            dispatch.measure()
        facts = _machine()
    if args.json:
        console.write_json(facts, args.json)
    if args.json == console.STDOUT:
        return 0
    if args.devices:
        _print_devices(facts["devices"])
    else:
        _print_machine(facts)
    return 0
