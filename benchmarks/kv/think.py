"""What ThinK's channels lose beside others': scores of queries that come later, and likelihood of text.

    python -m benchmarks kv.think MODEL NAME --text FILE [--prompt 1024] [--follow 128] [--texts 3] [--errors-only]

Channels are chosen by ``think`` (the last queries of the prompt and its keys), by the keys' norm alone, by the keys'
mean, and by lot; all arms keep as many of each key head. Error: of the scores that the last 64 tokens of the text give
to the prompt's keys, squared, summed over tokens and keys, as a share of the scores' own squares, mean over layers and
texts. Likelihood: the engine's, whose ``Channels`` choose in one of these ways; the text goes on as a second prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.evals.long_context.continuation import Passage, diverge, passages, reference
from barefoot.evals.scoring import spread_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.channels import Channels
from barefoot.kv.policies import top
from barefoot.kv.storage import F32, Heads, Shape
from barefoot.kv.stores.think import Think
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import Attended, attended
from benchmarks.kv.policies import engine

RATIOS = (0.3, 0.4, 0.5)
FUTURE = 64
PAPER = "40 % of key channels go at an equal or better score, over SnapKV and H2O (LLaMA-3-8B, Mistral-7B; LongBench)"

Choose = Callable[[F32, F32, F32, int], F32]  # squares of queries, of keys, sums of keys, a layer → scores

WAYS: dict[str, Choose] = {
    "queries and keys": lambda asked, squares, sums, layer: asked * squares,
    "norm of keys": lambda asked, squares, sums, layer: squares,
    "mean of keys": lambda asked, squares, sums, layer: np.abs(sums),
    "by lot": lambda asked, squares, sums, layer: np.random.default_rng(layer).random(squares.shape, np.float32),
}


def errors(layers: Sequence[Attended], n: int, ratio: float) -> dict[str, list[float]]:
    """Of each layer, by each way; the first is what ``think`` itself chooses."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, layer in enumerate(layers):
        keys, dim = layer.k[:, :n], layer.k.shape[2]
        store = Think(ratio=ratio)
        shape = Shape(Heads(len(layer.q), len(keys), dim, layer.scale), 1, n)
        channels = Channels(shape, store, lambda n_bytes: np.zeros(n_bytes, np.uint8))
        asked = layer.q[:, :n].swapaxes(0, 1).reshape(n, -1)
        channels.see(0, np.ascontiguousarray(asked), 0)
        squares, sums = np.square(keys).sum(axis=1), keys.sum(axis=1)
        last = np.square(layer.q[:, n - store.window : n]).sum(axis=1)
        of_queries = last.reshape(len(keys), layer.sharing, dim).sum(axis=1)
        channels.choose(0, squares)
        for way, score in WAYS.items():
            kept = top(score(of_queries, squares, sums, number), store.n_kept(dim))
            assert way != "queries and keys" or np.array_equal(kept, channels.kept[0])
            lost = scores = 0.0
            for head, q in enumerate(layer.q[:, -FUTURE:]):
                own = head // layer.sharing
                gone = np.setdiff1d(np.arange(dim), kept[own])
                lost += float(np.square(q[:, gone] @ keys[own][:, gone].T).sum())
                scores += float(np.square(q @ keys[own].T).sum())
            found[way].append(lost / scores)
    return found


@contextmanager
def chosen(way: str) -> Iterator[None]:
    """Have the engine choose channels in another way. Sums of keys, which it hasn't, are not among them."""
    before = Channels.choose

    def choose(self: Channels, layer: int, squares: F32) -> None:
        self.kept[layer] = top(WAYS[way](self._asked[layer], squares, squares, layer), self.kept.shape[2])
        self._chosen[layer] = True

    Channels.choose = choose  # type: ignore[method-assign]
    try:
        yield
    finally:
        Channels.choose = before  # type: ignore[method-assign]


def likelihood(checkpoint: Checkpoint, texts: Sequence[Passage], arms: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Of each (way, composition): bytes of a sequence, and what the continuation says of it."""
    n = len(texts[0].prompt) + len(texts[0].continuation)
    with engine(checkpoint, "f16", n, 1, 1) as run:
        references = [reference(run, text, stepwise=False) for text in texts]
    found = {}
    for way, kv in arms:
        with chosen(way), engine(checkpoint, kv, n, 1, 1) as run:
            n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
            along = diverge(run, texts, references, stepwise=False)
        kv = str(parse_kv(kv))
        name = kv if way == "queries and keys" else f"{kv}, {way}"
        rise = along["nll"] - along["reference_nll"]
        found[name] = {"kv_bytes": n_bytes, "rise_of_nll": rise, "kl": along["kl_mean"], "nll": along["nll"]}
        print(f"  {name:44} {n_bytes / 2**20:7.2f} MiB  KL {along['kl_mean']:.5f}  NLL {rise:+.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: think_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--follow", type=int, default=128)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--errors-only", action="store_true")
    args = parser.parse_args()
    config = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name}
    card(f"channels of keys on {args.name}", config)
    with Checkpoint(args.model) as checkpoint:
        tokenizer, text = load_tokenizer(checkpoint), read_text(args.text)
        windows = spread_windows(text, tokenizer, args.prompt + FUTURE, args.texts).tolist()
        lost: dict[str, dict[str, list[float]]] = {}
        for ids in windows:
            layers = attended(args.model, ids)
            for ratio in RATIOS:
                for way, some in errors(layers, args.prompt, ratio).items():
                    lost.setdefault(str(ratio), {}).setdefault(way, []).extend(some)
        means = {r: {way: float(np.mean(some)) for way, some in ways.items()} for r, ways in lost.items()}
        for name, each in means.items():
            print(f"  {name}: " + "  ".join(f"{way} {mean:.4f}" for way, mean in each.items()), flush=True)
        results: dict[str, Any] = {"errors": means}
        met = of_errors(means)
        if not args.errors_only:
            keep = args.prompt // 2
            arms = [
                (way, f"think(ratio={r})") for r in RATIOS for way in ("queries and keys", "norm of keys", "by lot")
            ]
            plain = [
                "think(ratio=0.0)", "q8", "think > q8", "kivi(bits=4)", "think > kivi(bits=4)",
                f"h2o(keep={keep})", f"h2o(keep={keep}) > think", f"h2o(keep={keep}) > think > q8",
            ]  # fmt: skip
            arms += [("queries and keys", kv) for kv in plain]
            texts = passages(text, tokenizer, args.prompt, args.follow, args.texts)
            found = likelihood(checkpoint, texts, arms)
            results["text"] = found
            met += of_text(found)
    save(f"kv/think_{args.name}", {"config": config, "paper": PAPER, "results": results, "claims": met})


def of_errors(means: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    found = []
    for ratio, lost in means.items():
        by_lot, by_norm, ours = lost["by lot"], lost["norm of keys"], lost["queries and keys"]
        found.append(claim(f"error of scores at {ratio}, of that by lot", ours / by_lot, at_most=0.7))
        found.append(claim(f"error of scores at {ratio}, of that by the keys' norm", ours / by_norm, at_most=1.0))
        found.append(claim(f"the same, the keys' norm of that by lot, at {ratio}", by_norm / by_lot, at_most=1.0))
    return found


def of_text(found: dict[str, Any]) -> list[dict[str, Any]]:
    whole = found["think(ratio=0.0) > f16"]["rise_of_nll"]
    lines = [claim("rise of NLL where no channel goes", abs(whole), at_most=1e-4)]
    for ratio in RATIOS:
        spec = "think > f16" if ratio == Think().ratio else f"think(ratio={ratio}) > f16"
        ours, by_lot = (found[name]["rise_of_nll"] for name in (spec, f"{spec}, by lot"))
        lines.append(claim(f"rise of NLL at {ratio}, of that by lot", ours / by_lot, at_most=0.5))
    return lines


if __name__ == "__main__":
    main()
