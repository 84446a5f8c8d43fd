"""What every benchmark shares: fresh processes, interleaved rounds, medians, one JSON record.

A benchmark prints a static card first (what is run, with which bytes), then measures every contender in alternating
rounds, and ends with its record as one JSON line, which is also kept in ``benchmarks/results/<name>.json``::

    name, date, commit, machine, versions     where and with what
    config                                    the benchmark's own settings
    card                                      static facts, before any measurement
    results   {contender: {metric: {median, min, max, runs}}}
    ratios    {what: number}                  ours against the peer's, in this run
    claims    [{claim, bound, measured, met}] what the benchmark was to show
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor, cores, memory and system of this machine."""
    cpu, memory = platform.processor(), None
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text()
        cpu = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), cpu)
        flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
        cpu += " " + " ".join(f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "system": platform.platform()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, barefoot and ``packages`` as far as they are installed here."""
    found = {"python": platform.python_version()}
    for name in ("barefoot", "numpy", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return done.stdout.strip() or "unknown"


def child(
    script: Path, settings: Mapping[str, Any], python: str = sys.executable, timeout: float = 1800
) -> dict[str, Any]:
    """Run ``script`` in a fresh process, ``settings`` as its JSON argument; its last line of output is the result."""
    # Not as `python script`, which would let modules beside the script shadow installed ones (llama_cpp).
    start = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [python, "-c", start, str(script), json.dumps(settings)]
    # A peer's interpreter has no barefoot; its worker only takes the plain-Python measuring from the sources.
    env = None if python == sys.executable else {**os.environ, "PYTHONPATH": str(RESULTS.parents[1] / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def read_bandwidth(n_threads: int = 2, n_bytes: int = 256 << 20) -> float:
    """GB/s at which ``n_threads`` processes together read memory now: the state of the machine."""
    code = (
        f"import numpy,time,sys; a=numpy.ones({n_bytes // n_threads}//8); s=time.perf_counter(); t=0\n"
        "while time.perf_counter()-s<0.4: a.max(); t+=a.nbytes\n"
        "print(t/(time.perf_counter()-s)/1e9)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(n_threads)]
    return round(sum(float(run.communicate()[0]) for run in runs), 1)


def rounds(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]], n_rounds: int, warmup: int = 1
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure contenders in alternating rounds, so that a slow spell of the machine hits all of them alike.

    Returns contender → metric → {median, min, max, runs}. The first ``warmup`` rounds are not counted.
    """
    seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for i in range(warmup + n_rounds):
        for name, measure in contenders.items():
            values = measure()
            if i >= warmup:
                seen[name].append(values)
            print(f"  round {i + 1 - warmup}/{n_rounds} {name}: {_short(values)}", flush=True)
    return {name: {metric: spread([run[metric] for run in runs]) for metric in runs[0]} for name, runs in seen.items()}


def _short(values: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:,.4g}" for key, value in values.items() if isinstance(value, int | float))


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def claim(text: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One line of the record's ``claims``: the bound, what was measured, and whether it is met."""
    met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    return {"claim": text, "at_least": at_least, "at_most": at_most, "measured": round(measured, 4), "met": met}


def card(title: str, facts: Mapping[str, Any]) -> None:
    print(title)
    for key, value in facts.items():
        print(f"  {key:<28} {value}")


def save(name: str, record: Mapping[str, Any], *packages: str) -> None:
    """Print the record as one JSON line and keep it in ``benchmarks/results/<name>.json``."""
    full = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(*packages),
        **record,
    }
    for line in full.get("claims", []):
        bounds = ((">=", line["at_least"]), ("<=", line["at_most"]))
        bound = " and ".join(f"{sign} {value}" for sign, value in bounds if value is not None)
        print(f"  {'met   ' if line['met'] else 'MISSED'} {line['claim']}: {line['measured']} ({bound})")
    path = RESULTS / f"{name.replace('/', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(full, indent=1) + "\n")
    print(json.dumps(full))
