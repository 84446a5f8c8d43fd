"""What MiKV keeps of what an evictor loses: copies, likelihood, and what the balance of channels is for.

    python -m benchmarks kv.mikv MODEL NAME --text FILE [--prompt 1024] [--words 256] [--texts 2]

Copies: random words, then the same words again (:mod:`barefoot.evals.long_context.copying`), each foreseen token by
token by a cache of which a fifth is important. Likelihood: of text behind a prompt, decoded token by token. Baselines
with the same important entries: those alone (``h2o``); with as few bits: all tokens rounded (``q4``, ``q3``, ``q2``).
Error of the balance: scores that the last 64 tokens of a text give to the prompt's keys in 2 bits, squared, as a share
of the scores' own squares, mean over layers; the balance is what the prompt says.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.evals.long_context.continuation import Passage, diverge, passages, reference
from barefoot.evals.long_context.copying import copying
from barefoot.evals.long_context.sessions import Session, in_turn
from barefoot.evals.scoring import spread_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.demoting import balance
from barefoot.ops import kvrows
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import Attended, attended
from benchmarks.kv.policies import engine

FUTURE = 64
SHARES = (0.1, 0.2, 0.5)
PAPER = "line retrieval 99.8 % with half of the tokens in 3 bits, where 43 % without them (Llama-2-7B); 80 % less cache"


def copied(checkpoint: Checkpoint, sessions: Sequence[Session], kv: str, n_tokens: int) -> dict[str, float]:
    """The share of words that are foreseen, and bytes of a sequence."""
    with engine(checkpoint, kv, n_tokens, 1, 1) as run:
        right = [one for session in sessions for answer in in_turn(run, session) for one in answer.right]
        n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
    return {"kv_bytes": n_bytes, "words": sum(right) / len(right)}


def along(checkpoint: Checkpoint, texts: Sequence[Passage], kvs: Sequence[str]) -> dict[str, dict[str, float]]:
    n = len(texts[0].prompt) + len(texts[0].continuation)
    found = {}
    with engine(checkpoint, "f16", n, 1, 1) as run:
        references = [reference(run, text) for text in texts]
    for kv in kvs:
        with engine(checkpoint, kv, n, 1, 1) as run:
            n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
            seen = diverge(run, texts, references)
        rise = seen["nll"] - seen["reference_nll"]
        found[kv] = {"kv_bytes": n_bytes, "rise_of_nll": rise, "kl": seen["kl_mean"]}
        print(f"  {kv:40} {n_bytes / 2**20:7.2f} MiB  KL {seen['kl_mean']:.5f}  NLL {rise:+.4f}", flush=True)
    return found


def errors(layers: Sequence[Attended], n: int, bits: int) -> dict[str, list[float]]:
    """Of each layer, of keys in so many bits, with their channels in balance and as they are."""
    found: dict[str, list[float]] = {"balanced": [], "as they are": []}
    for layer in layers:
        keys, dim = layer.k[:, :n], layer.k.shape[2]
        largest = np.abs(layer.q[:, :n]).reshape(len(keys), -1, dim).max(axis=1)
        factors = {"balanced": balance(largest, np.abs(keys).max(axis=1)), "as they are": np.ones_like(largest)}
        for name, own in factors.items():
            factor = own[:, None]
            codes = kvrows.decode(f"q{bits}", kvrows.encode(f"q{bits}", keys * factor), dim) / factor
            lost = scores = 0.0
            for head, q in enumerate(layer.q[:, -FUTURE:]):
                exact, got = (q @ k[head // layer.sharing].T for k in (keys, codes))
                lost, scores = lost + float(np.square(got - exact).sum()), scores + float(np.square(exact).sum())
            found[name].append(lost / scores)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: mikv_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--follow", type=int, default=64)
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    config = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name}
    card(f"mixed precision on {args.name}", config)
    results: dict[str, Any] = {"copies": {}, "balance": {}, "text": {}}
    with Checkpoint(args.model) as checkpoint:
        tokenizer, text = load_tokenizer(checkpoint), read_text(args.text)
        for ids in spread_windows(text, tokenizer, args.prompt + FUTURE, args.texts).tolist():
            layers = attended(args.model, ids)
            for bits in (2, 3, 4):
                for name, each in errors(layers, args.prompt, bits).items():
                    results["balance"].setdefault(str(bits), {}).setdefault(name, []).extend(each)
        for ways in results["balance"].values():
            ways.update({name: float(np.mean(each)) for name, each in ways.items()})
        print(f"  error of scores, by bits: {results['balance']}", flush=True)
        sessions = [copying(tokenizer, args.words, seed) for seed in range(args.copies)]
        keep = round(args.words / 5)
        h2o = f"h2o(keep={keep})"
        for kv in (
            "f16", "q4", "q3", "q2", h2o, f"{h2o} > mikv(bits=4)", f"{h2o} > mikv(bits=3)", f"{h2o} > mikv",
            f"{h2o} > mikv(balance=false)", f"random(keep={keep})", f"random(keep={keep}) > mikv(bits=4)",
        ):  # fmt: skip
            results["copies"][kv] = found = copied(checkpoint, sessions, kv, 2 * args.words + 64)
            print(f"  {kv:40} {found['kv_bytes'] / 2**20:7.2f} MiB  {found['words']:.3f} of the words", flush=True)
        texts = passages(text, tokenizer, args.prompt, args.follow, args.texts)
        keeps = {share: round(share * args.prompt) for share in SHARES}
        kvs = [f"h2o(keep={n}){rest}" for n in keeps.values() for rest in ("", " > mikv(bits=4)")]
        kvs += [f"h2o(keep={keeps[0.2]}) > mikv{knobs}" for knobs in ("(bits=3)", "", "(balance=false)")]
        results["text"] = along(checkpoint, texts, [*kvs, "q4", "q3", "q2"])
    record = {"config": config, "paper": PAPER, "results": results}
    save(f"kv/mikv_{args.name}", {**record, "claims": claims(results, h2o, keeps)})


def claims(results: dict[str, Any], h2o: str, keeps: dict[float, int]) -> list[dict[str, Any]]:
    words = {kv: each["words"] for kv, each in results["copies"].items()}
    rise = {kv: each["rise_of_nll"] for kv, each in results["text"].items()}
    balanced, plain = (results["balance"]["2"][name] for name in ("balanced", "as they are"))
    return [
        claim("copies in 4 bits, of the full cache's", words[f"{h2o} > mikv(bits=4)"] / words["f16"], at_least=0.9),
        claim("copies in 4 bits, less those of H2O", words[f"{h2o} > mikv(bits=4)"] - words[h2o], at_least=0.3),
        *(
            claim(
                f"rise of NLL with {n} important entries, 4 bits less H2O",
                rise[f"h2o(keep={n}) > mikv(bits=4)"] - rise[f"h2o(keep={n})"],
                at_most=0.0,
            )
            for n in keeps.values()
        ),
        claim("error of scores in 2 bits, balanced of plain", balanced / plain, at_most=1.0),
    ]


if __name__ == "__main__":
    main()
