"""barefoot beside llama.cpp on the same file: decode, prefill, peak memory; perplexity and KL at equal file.

    python -m benchmarks.run.beside_llama_cpp MODEL.gguf NAME [--peer-python PYTHON] [--rounds 5] [--text FILE]

Each round is two fresh processes, one of each, in turn. The peer runs in the interpreter that ``--peer-python`` names,
where llama-cpp-python is built for this processor. Quality is measured against barefoot's own float32 path on the same
file, which the tests hold to transformers within 2e-4.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.evals.divergence import Divergence, windows
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save

HERE = Path(__file__).parent


def quality(model: str, text: str, n_windows: int, window: int, n_threads: int, peer: str) -> dict[str, Any]:
    """KL and perplexity of both on the second halves of windows, against the float32 path."""
    with Checkpoint(model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text[: 12 * n_windows * window], add_bos=False)
    texts = list(windows(ids, window, tokenizer.bos_id if tokenizer.add_bos else None))[:n_windows]
    settings = {"model": model, "context": window, "n_threads": n_threads, "logits_of": texts}
    targets = np.concatenate([np.asarray(t[window // 2 + 1 :]) for t in texts])
    with tempfile.TemporaryDirectory() as folder:

        def logits(worker: str, python: str, **more: Any) -> np.ndarray:
            out = f"{folder}/{worker}{more.get('activations', '')}.npy"
            child(HERE / worker, settings | more | {"out": out}, python)
            return np.load(out, mmap_mode="r")

        reference = logits("barefoot_worker.py", sys.executable, activations="float32", kv="f32")
        found = {
            "barefoot": logits("barefoot_worker.py", sys.executable),
            "llama.cpp": logits("llama_cpp_worker.py", peer),
        }
        result = {}
        for name, theirs in found.items():
            divergence = Divergence()
            for start in range(0, len(targets), 64):
                tile = slice(start, start + 64)
                divergence.add(reference[tile], theirs[tile], targets[tile])
            result[name] = divergence.summary
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--text", help="for the quality; default: Python's own help topics")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()

    context = args.prefill + args.decode
    base = {"model": args.model, "context": context, "n_threads": args.threads}
    base |= {"prefill": args.prefill, "decode": args.decode}
    facts = {k: v for k, v in base.items() if k != "model"} | {
        "file": Path(args.model).name,
        "file MiB": round(Path(args.model).stat().st_size / 2**20, 1),
        "read GB/s before": read_bandwidth(args.threads),
    }
    card(f"run: barefoot beside llama.cpp, {args.name}", facts)
    results = rounds(
        {
            "barefoot": lambda: child(HERE / "barefoot_worker.py", base),
            "llama.cpp": lambda: child(HERE / "llama_cpp_worker.py", base, args.peer_python),
        },
        args.rounds,
    )
    facts["read GB/s after"] = read_bandwidth(args.threads)
    text = Path(args.text).read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values())
    for name, summary in quality(args.model, text, args.windows, args.window, args.threads, args.peer_python).items():
        results[name]["quality"] = summary
        print(f"  quality {name}: {summary}")

    def ratio(metric: str) -> float:
        return round(results["barefoot"][metric]["median"] / results["llama.cpp"][metric]["median"], 3)

    ratios = {metric: ratio(metric) for metric in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_mib", "load_s")}
    save(
        f"run/beside_llama_cpp_{args.name}",
        {
            "config": base | {"model": Path(args.model).name, "rounds": args.rounds},
            "card": facts,
            "results": results,
            "ratios": ratios,
            "claims": [claim("peak resident memory below llama.cpp's, ratio", ratios["peak_mib"], at_most=1.0)],
        },
        "llama-cpp-python",
    )


if __name__ == "__main__":
    main()
