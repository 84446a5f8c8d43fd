"""The engine beside llama.cpp and OpenVINO GenAI: decode, prefill, long contexts, memory, first token; case by case.

    python -m benchmarks run.engine --packaged SMOLLM2.gguf --peer-python PYTHON [--openvino-python PYTHON]
        [--files FOLDER] [--cases NAME ...] [--rounds 5]

``--packaged`` is the Q4_1 file of SmolLM2-135M-Instruct; the other files are made from it, or at random, in ``--files``
once. A round is one fresh process of each contender, in turn; a ratio is the median of the rounds' own ratios. Each
case leaves its own record. The peers run in interpreters of their own: llama-cpp-python built for this processor
(where gcc 12 builds it for AMX, with ``-fno-tree-dse -fno-dse``: else its tile configuration is optimized away and it
crashes), and openvino-genai.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save
from benchmarks.models.random_llama import SHAPES, write

HERE = Path(__file__).parent
WORKERS = {
    "barefoot": "barefoot_worker.py",
    "llama.cpp": "llama_cpp_worker.py",
    "OpenVINO": "openvino_worker.py",
}
#: How files are made: at random in a shape, or by llama.cpp from another one.
RANDOM = {"tinyllama-q4_0": "tinyllama-1.1b", "smollm2-long": "smollm2-135m"}
REQUANTIZED = {
    "smollm2-q4_0": ("packaged", "q4_0"),
    "tinyllama-q2_k": ("tinyllama-q4_0", "q2_k"),
    "tinyllama-tq2_0": ("tinyllama-q4_0", "tq2_0"),
}
#: All in two bits (or three values), the embedding in the file's own four: it is read a row at a time.
TWO_BITS = "attn=int(bits=2,group=128) ffn=int(bits=2,group=128) head=int(bits=2,group=128)"
TERNARY = "attn=ternary ffn=ternary head=ternary"
DECODE, PREFILL, PEAK, FIRST = "decode_tokens_per_s", "prefill_tokens_per_s", "peak_mib", "first_token_s"
#: 32 tokens of SmolLM2.
PROMPT = (
    "The old mill by the river had stood empty for thirty years when a family of boat builders came from the north and "
    "asked the miller for its keys and boats"
)


@dataclass(frozen=True)
class Contender:
    engine: str
    file: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    """``own`` against ``peer``; the ratio of each claim's metric is own over peer."""

    own: Contender
    peer: Contender | None
    claims: tuple[Claim, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: int | None = None


def same(file: str, **peer_settings: Any) -> dict[str, Contender]:
    return {"own": Contender("barefoot", file), "peer": Contender("llama.cpp", file, peer_settings)}


def long(own_kv: str, peer_kv: str) -> dict[str, Any]:
    peer = Contender("llama.cpp", "smollm2-q4_0", {"kv": peer_kv})
    return {
        "own": Contender("barefoot", "smollm2-q4_0", {"kv": own_kv}),
        "peer": peer,
        "settings": {"prefill": 8000, "decode": 64},
        "rounds": 2,
    }


TINY = "tinyllama-q4_0"
CASES = {
    "smollm2-q4_0": Case(
        **same("smollm2-q4_0"), claims=(Claim(DECODE, 1.25, aim=1.8), Claim(PEAK, at_most=0.75, aim=0.6))
    ),
    "packaged": Case(**same("packaged"), claims=(Claim(DECODE, 1.5, aim=2.0), Claim(PEAK, at_most=0.75, aim=0.6))),
    "tinyllama-q4_0": Case(**same(TINY), claims=(Claim(DECODE, 1.0, aim=1.08), Claim(PEAK, at_most=0.75, aim=0.6))),
    # llama.cpp prefills faster with flash attention and decodes faster without: each is held against its better half.
    **{
        f"{file}-flash": Case(**same(file, flash_attn=True), claims=(Claim(PREFILL, 1.4, aim=2.5),))
        for file in ("smollm2-q4_0", "packaged", TINY)
    },
    # From an empty context, as llama.cpp's own bench decodes: all that is read are the weights.
    "tinyllama-decode": Case(**same(TINY), claims=(Claim(DECODE, 1.0, aim=1.08),), settings={"prefill": 8}),
    "two-bits-own": Case(
        Contender("barefoot", TINY, {"weights": TWO_BITS}),
        Contender("barefoot", TINY),
        (Claim(DECODE, 1.6, aim=1.9),),
        {"prefill": 64},
        rounds=3,
    ),
    "two-bits": Case(
        Contender("barefoot", TINY, {"weights": TWO_BITS}),
        Contender("llama.cpp", "tinyllama-q2_k"),
        (Claim(DECODE, 1.6, aim=2.1),),
        {"prefill": 64},
        rounds=3,
    ),
    "ternary": Case(
        Contender("barefoot", TINY, {"weights": TERNARY}),
        Contender("llama.cpp", "tinyllama-tq2_0"),
        (Claim(DECODE, 1.25, aim=1.6),),
        {"prefill": 64},
        rounds=3,
    ),
    "openvino": Case(
        Contender("barefoot", "packaged"), Contender("OpenVINO", "packaged"), (Claim(PREFILL, 0.9, aim=1.3),)
    ),
    "long-f16": Case(**long("f16", "f16"), claims=(Claim(DECODE, 2.0, aim=4.0), Claim(PREFILL, 2.0, aim=4.0))),
    "long-f16-flash": Case(
        **long("f16", "f16") | {"peer": Contender("llama.cpp", "smollm2-q4_0", {"kv": "f16", "flash_attn": True})},
        claims=(Claim(DECODE, 2.0, aim=4.0), Claim(PREFILL, 2.0, aim=4.0)),
    ),
    "long-q8": Case(**long("q8", "q8_0"), claims=(Claim(DECODE, 3.0, aim=8.0), Claim(PREFILL, 4.0, aim=10.0))),
    "long-q4": Case(**long("q4", "q4_0"), claims=(Claim(DECODE, 6.0, aim=15.0),)),
    "32k-q8": Case(
        Contender("barefoot", "smollm2-long", {"kv": "q8"}), None, (), {"prefill": 32_000, "decode": 32}, rounds=1
    ),
    "32k-q4": Case(
        Contender("barefoot", "smollm2-long", {"kv": "q4"}), None, (), {"prefill": 32_000, "decode": 32}, rounds=1
    ),
    "threads": Case(
        Contender("barefoot", "packaged"),
        Contender("barefoot", "packaged", {"n_threads": 1}),
        (Claim(PREFILL, 1.7), Claim(DECODE)),
    ),
    "first-token": Case(**same("packaged"), claims=(Claim(FIRST, at_most=1.0, aim=0.6),)),
}


def prepare(name: str, args: argparse.Namespace) -> str:
    """The path of a file of that name, made if it is not there yet."""
    if name == "packaged":
        return str(args.packaged)
    path = Path(args.files) / f"{name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        if name in RANDOM:
            write(str(partial), SHAPES[RANDOM[name]], "q4_0", seed=0)
        else:
            source, kind = REQUANTIZED[name]
            settings = {"source": prepare(source, args), "to": str(partial), "type": kind}
            child(HERE.parent / "models" / "requantize.py", settings, args.peer_python)
        partial.rename(path)
    return str(path)


def bytes_a_token(path: str) -> int:
    """Of weights that one decoded token reads."""
    with Checkpoint(path) as checkpoint:
        spec = model_spec(checkpoint)
    read = [w for w in spec.weights if spec.tied or w.name != "embed"]
    return sum(w.rows * blocks.row_bytes(w.format, w.cols) for w in read)


def first_token(contender: Contender, path: str, python: str, n_threads: int) -> Mapping[str, float]:
    """Seconds from starting a process to the end of one that has answered a single token.

    A few lines of Python over each library; for barefoot also its command, which plans and measures first.
    """
    start = time.perf_counter()
    settings = {"model": path, "context": 512, "n_threads": n_threads, "first_token_of": PROMPT}
    child(HERE / WORKERS[contender.engine], settings, python)
    result = {FIRST: time.perf_counter() - start}
    if contender.engine == "barefoot":
        command = [sys.executable, "-m", "barefoot", "run", path, PROMPT, "--raw", "--max-tokens", "1", "--json"]
        command += ["--threads", str(n_threads), "--context", "512", "--temperature", "0", "--memory", "512MiB"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        result["command_first_token_s"] = time.perf_counter() - start
    return result


def measure(name: str, case: Case, args: argparse.Namespace) -> None:
    pythons = {"barefoot": sys.executable, "llama.cpp": args.peer_python, "OpenVINO": args.openvino_python}
    base = {"prefill": 512, "decode": 128, "n_threads": args.threads} | dict(case.settings)
    base["context"] = base["prefill"] + base["decode"]
    wanted = {"own": case.own} | ({"peer": case.peer} if case.peer else {})
    seen: dict[str, list[Mapping[str, float]]] = {side: [] for side in wanted}
    titles = {side: f"{side}: {c.engine} {c.file} {dict(c.settings) or ''}".strip() for side, c in wanted.items()}
    paths = {side: prepare(c.file, args) for side, c in wanted.items()}

    def process(side: str) -> Callable[[], Mapping[str, float]]:
        contender, path, python = wanted[side], paths[side], pythons[wanted[side].engine]

        def once() -> Mapping[str, float]:
            if FIRST in (c.metric for c in case.claims):
                result = first_token(contender, path, python, args.threads)
            else:
                settings = base | {"model": path} | dict(contender.settings)
                result = child(HERE / WORKERS[contender.engine], settings, python, timeout=3600)
            seen[side].append(result)
            return result

        return once

    facts = {"cores and threads": args.threads, **titles, "read GB/s before": read_bandwidth(args.threads)}
    card(f"engine: {name}", facts)
    n_rounds = case.rounds or args.rounds
    warmup = 1 if n_rounds > 3 else 0
    results = rounds({titles[side]: process(side) for side in wanted}, n_rounds, warmup)
    facts["read GB/s after"] = read_bandwidth(args.threads)
    ratios, claims = {}, []
    for each in case.claims:
        pairs = list(zip(seen["own"], seen["peer"], strict=True))[warmup:]
        ratio = round(statistics.median(own[each.metric] / peer[each.metric] for own, peer in pairs), 3)
        ratios[each.metric] = ratio
        if each.at_least is not None or each.at_most is not None:
            text = f"{name}: {each.metric}, own over peer" + (f" (aim {each.aim})" if each.aim else "")
            claims.append(claim(text, ratio, at_least=each.at_least, at_most=each.at_most))
    if name == "tinyllama-decode":  # decoding reads every weight once: its speed is a read bandwidth
        reached = bytes_a_token(paths["own"]) * results[titles["own"]][DECODE]["median"] / 1e9
        facts["GB/s of weights while decoding"] = round(reached, 2)
        share = reached / statistics.median([facts["read GB/s before"], facts["read GB/s after"]])
        claims.append(claim("share of the read bandwidth while decoding (aim 0.97)", share, at_least=0.88))
    record = {"config": base, "card": facts, "results": results, "ratios": ratios, "claims": claims}
    save(f"run/engine_{name}", record, "llama-cpp-python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packaged", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--files", default="build/benchmark-files")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in args.cases:
        measure(name, CASES[name], args)


if __name__ == "__main__":
    main()
