"""Devices: places with capacities and bandwidths, compute peaks, and where each number comes from.

:func:`known_devices` reads the table ``devices.toml``. :func:`this_machine` describes the machine that runs: its memory
and cores are read at once, its speeds come from the last probe (:mod:`barefoot.core.probe`, refreshed by ``barefoot
doctor``) and, where there was none, from defaults that say so. Nothing here measures anything.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from barefoot.core.errors import InvalidInput, unknown_name
from barefoot.core.ledger import Place
from barefoot.core.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Compute = Literal["int8", "f16", "f32"]
GB = 10**9
PROBE_VERSION = 3

# Used for this machine until it has been probed; each is reported with the source "default, not measured".
DEFAULT_MEMORY_GB_S, DEFAULT_DISK_GB_S, DEFAULT_F32_PER_CORE, DEFAULT_OP_SECONDS = 12.0, 0.5, 40e9, 5e-6
NOT_MEASURED = "default, not measured: run barefoot doctor"


@dataclass(frozen=True)
class Device:
    """A machine that a plan is made for.

    Attributes
    ----------
    name, title : the id that ``--device`` takes, and what people call it.
    memory_bytes : capacity of each place; that of ``accelerator`` is the sum over ``n_accelerators``.
    read_gb_s : read bandwidth of each place in 10^9 bytes a second; that of ``accelerator`` is one accelerator's.
    peaks : operations a second of the place that computes (all cores, or one accelerator) by type of arithmetic; a
        multiply-add is two operations.
    host_peak : f32 operations a second of the host beside an accelerator; 0 where the host itself computes.
    link_gb_s : host to accelerator; 0 without accelerator.
    peer_gb_s : between accelerators, one direction; 0 when they only meet through the host.
    op_seconds : fixed time of one operator, from dispatch to return.
    layouts : class of matrices → layout, where it was measured to be faster than panels (:mod:`barefoot.ops.dispatch`).
    sources : where each number comes from, by field name (``"read_gb_s.host"``) or for all (``"*"``).
    checked : whether the numbers were compared with the source when written down (measured ones are).
    """

    name: str
    title: str
    memory_bytes: Mapping[Place, int]
    read_gb_s: Mapping[Place, float]
    peaks: Mapping[Compute, float]
    n_cores: int
    n_threads: int
    isa: tuple[str, ...] = ()
    host_peak: float = 0.0
    link_gb_s: float = 0.0
    peer_gb_s: float = 0.0
    n_accelerators: int = 0
    op_seconds: float = DEFAULT_OP_SECONDS
    layouts: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    checked: bool = True

    @property
    def place(self) -> Place:
        """Where the model computes: the accelerator if there is one, else the host."""
        return "accelerator" if self.n_accelerators else "host"

    def source(self, number: str) -> str:
        """Where ``number`` (a field, or ``field.key``) comes from."""
        for key in (number, number.split(".")[0], "*"):
            if key in self.sources:
                return self.sources[key]
        return "unknown"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def device_from_json(data: Mapping[str, Any]) -> Device:
    """The device that ``Device.to_json`` wrote."""
    return Device(**{**data, "isa": tuple(data.get("isa", ()))})


def cache_folder() -> Path:
    """``$BAREFOOT_CACHE``, or the platform's place for caches; not created here."""
    stated = os.environ.get("BAREFOOT_CACHE")
    if stated:
        return Path(stated).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "barefoot" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "barefoot"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "barefoot"


# The table of known machines.

_DISK = {"read_gb_s": 3.0, "source": "assumed: NVMe on PCIe 3"}
_HOST = {"memory": "64GB", "read_gb_s": 60.0, "f32_tops": 0.8, "cores": 8}


def _device_from_row(name: str, row: Mapping[str, Any]) -> Device:
    """One row of ``devices.toml``: units as people quote them there, base units here."""
    accelerated = row["place"] == "accelerator"
    place: Place = "accelerator" if accelerated else "host"
    memory: dict[Place, int] = {place: parse_bytes(row["memory"])}
    speed: dict[Place, float] = {place: float(row["read_gb_s"]), "disk": row.get("disk_gb_s", _DISK["read_gb_s"])}
    sources = {"*": row["source"], "read_gb_s.disk": row.get("disk_source", _DISK["source"]), **row.get("sources", {})}
    cores = row.get("cores", _HOST["cores"])
    host_peak = 0.0
    if accelerated:
        host = {**_HOST, **row.get("host", {})}
        memory["host"], speed["host"] = parse_bytes(host["memory"]), float(host["read_gb_s"])
        host_peak, cores = host["f32_tops"] * 1e12, host["cores"]
        assumed = host.get("source", "assumed: a desktop with 8 cores and two channels of DDR5")
        sources |= {"memory_bytes.host": assumed, "read_gb_s.host": assumed, "host_peak": assumed}
    return Device(
        name=name,
        title=row["title"],
        memory_bytes=memory,
        read_gb_s=speed,
        peaks={kind: tops * 1e12 for kind, tops in row["tops"].items()},
        n_cores=cores,
        n_threads=cores,
        isa=tuple(row.get("isa", ())),
        host_peak=host_peak,
        link_gb_s=float(row.get("link_gb_s", 0.0)),
        peer_gb_s=float(row.get("peer_gb_s", 0.0)),
        n_accelerators=1 if accelerated else 0,
        op_seconds=row.get("op_seconds", DEFAULT_OP_SECONDS),
        sources=sources,
        checked=row["checked"],
    )


@functools.cache
def known_devices() -> Mapping[str, Device]:
    """Name → device of the table, in its order."""
    table = tomllib.loads((Path(__file__).parent / "devices.toml").read_text(encoding="utf-8"))
    return {name: _device_from_row(name, row) for name, row in table.items()}


def parse_device(text: str) -> Device:
    """The device of a name such as ``"rtx-4090"``, of several accelerators (``"8x h100"``), or ``"this"``.

    Case, spaces, ``_`` and ``-`` don't matter.

    Raises
    ------
    InvalidInput : unknown name, or a number of machines that have no accelerator.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×]\s*)?(.+?)\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidInput("the device is empty", cure="name one, as in --device rtx-4090 or --device '8x h100'")
    n, wanted = int(match.group(1) or 1), re.sub(r"[\s_-]", "", match.group(2)).lower()
    if wanted == "this" and n == 1:
        return this_machine()
    found = {re.sub(r"-", "", name): device for name, device in known_devices().items()}.get(wanted)
    if found is None:
        raise unknown_name("device", match.group(2), [*known_devices(), "this"])
    if n == 1:
        return found
    if not found.n_accelerators or n < 1:
        raise InvalidInput(f"{text!r}: {found.title} is no accelerator that can be used {n} times")
    memory = {**found.memory_bytes, "accelerator": n * found.memory_bytes["accelerator"]}
    return dataclasses.replace(
        found, name=f"{n}x {found.name}", title=f"{n} × {found.title}", memory_bytes=memory, n_accelerators=n
    )


# This machine.


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {key: int(value.split()[0]) * 1024 for key, value in (line.split(":") for line in lines)}


def _cgroup_limit(root: Path, memberships: str) -> int | None:
    """The smallest memory limit among the caller's cgroup and its ancestors, versions 1 and 2; None without limit."""
    limits = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = Path(path.lstrip("/"))
        for part in (folder, *folder.parents):
            try:
                text = (base / part / file).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdecimal():
                limits.append(int(text))
    return min(limits, default=None)


def memory_limit() -> int | None:
    """Bytes that this process's memory cgroups allow; None where there is no cgroup or no limit."""
    try:
        memberships = Path("/proc/self/cgroup").read_text(encoding="ascii")
    except OSError:
        return None
    limit = _cgroup_limit(Path("/sys/fs/cgroup"), memberships)
    return None if limit is None or limit >= 1 << 60 else limit  # version 1 writes "no limit" as a huge number


def total_memory() -> tuple[int, str]:
    """Bytes of memory that this process can ever have, and where the number comes from."""
    installed, source = _meminfo().get("MemTotal", 0), "/proc/meminfo"
    if not installed and hasattr(os, "sysconf"):
        installed, source = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "sysconf"
    if not installed:
        installed, source = 4 << 30, NOT_MEASURED
    limit = memory_limit()
    return (limit, "memory cgroup") if limit is not None and limit < installed else (installed, source)


def available_memory() -> tuple[int, str]:
    """Bytes that can be allocated now without swapping, and where the number comes from."""
    total, source = total_memory()
    available = _meminfo().get("MemAvailable", total)
    return (available, "/proc/meminfo") if available < total else (total, source)


def usable_threads() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> tuple[str, int, tuple[str, ...]]:
    """Model name, physical cores that this process may use, and the instruction sets that the kernels care about."""
    threads = usable_threads()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), threads, ()
    fields = [tuple(part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line]
    first: dict[str, str] = {}
    for key, value in fields:
        first.setdefault(key, value)
    cores = set(re.findall(r"physical id\s*:\s*(\d+).*?core id\s*:\s*(\d+)", text, re.DOTALL))
    flags = (first.get("flags") or first.get("Features") or "").split()
    wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")
    isa = tuple(flag for flag in (*wanted, "asimd", "asimddp", "i8mm", "sve") if flag in flags)
    return first.get("model name", platform.machine()), min(threads, len(cores) or threads), isa


def probe_path() -> Path:
    return cache_folder() / "device.json"


def machine_id() -> str:
    """What tells one machine from another in the cache: host name, CPU model, cores and memory."""
    model, cores, _ = _cpu()
    return f"{platform.node()} · {model} · {cores} cores · {_meminfo().get('MemTotal', 0)} bytes"


def cached_probe() -> Mapping[str, Any] | None:
    """The last probe of this very machine, as :func:`barefoot.core.probe.probe` wrote it; None if there is none."""
    try:
        data = json.loads(probe_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("version") != PROBE_VERSION or data.get("machine") != machine_id():
        return None
    return data


def _measured_layouts() -> Mapping[str, Any]:
    dispatch = importlib.import_module("barefoot.ops.dispatch")  # by name: its kernels measure, in a layer above
    layouts: Mapping[str, Any] = dispatch.faster(dispatch.cached(usable_threads()))
    return layouts


def this_machine() -> Device:
    """The machine that runs: memory and cores as they are now, speeds from the last probe or stated defaults."""
    model, cores, isa = _cpu()
    measured: Mapping[str, Any] = cached_probe() or {}
    when = f"measured {measured.get('date')}"
    total, total_source = total_memory()

    def number(key: str, default: float) -> tuple[float, str]:
        value = measured.get(key)
        return (float(value), when) if value else (default, NOT_MEASURED)

    host, host_source = number("read_gb_s_all_threads", DEFAULT_MEMORY_GB_S)
    disk, disk_source = number("disk_gb_s", DEFAULT_DISK_GB_S)
    f32, f32_source = number("f32_ops", DEFAULT_F32_PER_CORE * cores)
    int8, int8_source = number("int8_ops", 0.0)
    overhead, overhead_source = number("op_seconds", DEFAULT_OP_SECONDS)
    # A dot-product instruction does four 8-bit multiply-adds where f32 does one, maddubs and widening two.
    dot = {"avx_vnni", "avx512_vnni", "asimddp"} & set(isa)
    ratio = 4 if dot else 2
    if not int8:
        int8, int8_source = ratio * f32, f"{ratio} × f32 ({'dot product' if dot else 'widening'} instructions)"
    return Device(
        name="this",
        title=f"this machine ({model})",
        memory_bytes={"host": total},
        read_gb_s={"host": host, "disk": disk},
        peaks={"int8": max(int8, f32), "f16": f32, "f32": f32},
        n_cores=cores,
        n_threads=usable_threads(),
        isa=isa,
        op_seconds=overhead,
        layouts=_measured_layouts(),
        sources={
            "memory_bytes": total_source,
            "read_gb_s.host": host_source,
            "read_gb_s.disk": disk_source,
            "peaks": f32_source,
            "peaks.int8": int8_source,
            "op_seconds": overhead_source,
            "*": "operating system",
        },
    )
