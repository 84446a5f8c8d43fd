"""Elastic Cache where the prompt is an image: what is kept of its patches while the answer reads them out.

    python -m benchmarks kv.elastic --images FOLDER [--work DIR] [--minutes 3] [--n 100] [--ratios 0.2 0.5]

FOLDER holds the four .gz files of Debian's package dataset-fashion-mnist. A small decoder is trained first
(:mod:`benchmarks.models.fashion_reader`; kept in the work directory). Each arm then answers for the same test images on
the engine, the answer's tokens being fed as they should be; its first one, the class, comes from the whole prompt.
``elastic`` keeps ⌈ratio · t⌉ entries behind t tokens. The other policies do so too, or ("fixed") keep from the start as
many as it has in the end. "one set" is H2O with scores summed over all heads, as the paper compares it; "random" keeps
the last 16 and draws the others.

The paper's distance of 25 entries is a fifth of what it keeps of its prompts at a ratio of 0.2, and most of what is
kept here; "nearer" is with as large a part of the prompt.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.policies import I32, Observation, Policy, Seen
from barefoot.kv.policies.elastic import Elastic
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.random import Random
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.ruled import Ruled
from barefoot.kv.slots import Slots
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f16 import HalfStore
from benchmarks.harness import card, claim, save
from benchmarks.models import fashion_reader as reader

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
PAPER = "lower perplexity than H2O and a local window with 10 to 90 % of the cache (LLaVA-1.5, Qwen-VL)"
PAPERS_PROMPT = 626  # tokens: LLaVA-1.5's 576 patches and about 50 words
COMPARED = (  # the first is what must hold here
    ("elastic", "last ones"),
    ("elastic", "sinks"),
    ("elastic", "h2o, one set"),
    ("elastic", "elastic, nothing merges"),
    ("elastic nearer", "elastic nearer, nothing merges"),
    ("elastic nearer", "elastic"),
    ("elastic nearer", "h2o, one set"),
    ("elastic nearer", "h2o"),
    ("elastic nearer", "random"),
    ("elastic nearer", "last ones, fixed"),
    ("elastic nearer", "h2o, one set, fixed"),
)


class OneSet(H2O):
    """Heavy hitters by scores summed over all heads: the same positions in all heads of a layer."""

    def _summed(self, seen: Seen) -> Seen:
        assert seen.observed is not None
        order = np.argsort(seen.position, axis=1)  # slots hold the same positions in another order in each head
        total = np.take_along_axis(seen.observed, order, axis=1).sum(axis=0)
        summed = np.empty_like(seen.observed)
        np.put_along_axis(summed, order, np.broadcast_to(total, summed.shape), axis=1)
        return replace(seen, observed=summed)

    def choose(self, seen: Seen) -> I32:
        return super().choose(self._summed(seen))

    def evict(self, seen: Seen) -> I32:
        return super().evict(self._summed(seen))


@dataclass(frozen=True)
class Growing(Policy):
    """A policy with as many entries as elastic has, at each step."""

    ruling: Policy
    like: Elastic

    @property
    def observes(self) -> Observation:  # type: ignore[override]
        return self.ruling.observes

    def slots(self, context: int) -> int:
        return self.like.slots(context)

    def _now(self, seen: Seen) -> Policy:
        return self.ruling.with_keep(self.like.budget(seen.n_tokens))

    def choose(self, seen: Seen) -> I32:
        return self._now(seen).choose(seen)

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return self.like.sends_away(n, n_tokens)

    def evict(self, seen: Seen) -> I32:
        return self._now(seen).evict(seen)


def arms(ratio: float) -> dict[str, Policy]:
    elastic = Elastic(ratio=ratio)
    nearer = replace(elastic, distance=round(elastic.distance * reader.N_PROMPT / PAPERS_PROMPT))
    most = elastic.budget(reader.N_TOKENS)
    others = {
        "h2o, one set": OneSet(keep=most),
        "h2o": H2O(keep=most),
        "sinks": Sinks(keep=most),
        "last ones": Sinks(keep=most, first=0),
        "random": Random(keep=most, recent=16),
    }
    return {
        "elastic": elastic,
        "elastic, nothing merges": replace(elastic, merging=False),
        "elastic nearer": nearer,
        "elastic nearer, nothing merges": replace(nearer, merging=False),
        **{name: Growing(policy, elastic) for name, policy in others.items()},
        **{f"{name}, fixed": policy for name, policy in others.items()},
    }


@contextmanager
def engine(checkpoint: Checkpoint, kv: KVStore) -> Iterator[Engine]:
    config = EngineConfig(context=reader.N_TOKENS, kv=kv, activations="float32")
    with Engine(checkpoint, model_spec(checkpoint), config) as run:
        yield run


def pass_prompt(run: Engine, ids: Ids) -> F32:
    run.reset()
    return run.prefill(ids[: reader.N_PROMPT].tolist()).copy()


def answered(run: Engine, ids: Ids) -> Iterator[F32]:
    """Logits before each of the answer's tokens but the first one, behind the prompt."""
    for token in ids[reader.N_PROMPT : -1].tolist():
        yield run.decode(token).copy()


def held(run: Engine) -> list[set[int]]:
    """Positions that the cache holds, of each layer and key head."""
    assert run._by_layer is not None
    storage = run._by_layer.caches[0].storage
    assert isinstance(storage, Slots)
    return [
        {int(p) for slot, p in enumerate(row) if slot != free}
        for layer in range(run.spec.n_layers)
        for row, free in zip(storage.position(layer), storage.free[layer], strict=True)
    ]


def patches(run: Engine) -> F64:
    """The share of layers and key heads that hold an entry at each patch's position, (rows, columns)."""
    places = range(*reader.PATCHES.indices(reader.N_TOKENS))
    return np.mean([[p in head for p in places] for head in held(run)], axis=0).reshape(reader.ROWS, reader.COLUMNS)


def scored(logits: F64, answer: Ids) -> dict[str, float]:
    """Nats that the answer's tokens cost, and the share of them that are likeliest, in all and by parts; and how many
    levels the read-out's likeliest tokens are off."""
    lost = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(answer)), answer]
    likeliest = logits.argmax(axis=1)
    found = {"nll": float(lost.mean())}
    for part, where in reader.ANSWER.items():
        found[f"{part} nll"] = float(lost[where].mean())
        found[f"{part} right"] = float((likeliest == answer)[where].mean())
    read = reader.ANSWER["read-out"]
    drawn = answer[read] > 0  # what isn't background
    found["read-out right, drawn"] = float((likeliest == answer)[read][drawn].mean())
    found["levels off"] = float(np.abs(likeliest - answer)[read].mean())
    return found


def measured(checkpoint: Checkpoint, kv: Ruled, images: Ids) -> tuple[dict[str, Any], F64]:
    """What an arm does, and the answer's nats a token by image."""
    each: list[dict[str, float]] = []
    maps = np.zeros((2, reader.ROWS, reader.COLUMNS))
    with engine(checkpoint, kv) as run:
        n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
        for ids in images:
            first = pass_prompt(run, ids)
            maps[0] += patches(run) / len(images)
            logits = np.stack([first, *answered(run, ids)]).astype(np.float64)
            maps[1] += patches(run) / len(images)
            each.append(scored(logits, ids[reader.N_PROMPT :]))
    mean = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    kept = {when: digits(m) for when, m in zip(("behind the prompt", "in the end"), maps, strict=True)}
    return {"kv_bytes": n_bytes, **mean, "kept": kept}, np.array([one["nll"] for one in each])


def digits(shares: F64) -> list[str]:
    """A row of patches as a word: tenths, 9 for all from nine tenths on, and a point for less than a hundredth."""
    return ["".join("." if share < 0.01 else str(min(9, int(10 * share))) for share in row) for row in shares]


def differences(checkpoint: Checkpoint, kv: KVStore, other: KVStore, images: Ids) -> float:
    """The largest one of logits."""
    with engine(checkpoint, kv) as one, engine(checkpoint, other) as two:
        return max(
            float(np.abs(a - b).max())
            for ids in images
            for a, b in zip(
                [pass_prompt(one, ids), *answered(one, ids)], [pass_prompt(two, ids), *answered(two, ids)], strict=True
            )
        )


def wrong_counts(checkpoint: Checkpoint, ratio: float, images: Ids) -> int:
    """Heads that, behind the prompt or any of the answer's tokens, don't hold ⌈ratio · t⌉ entries."""
    wrong = 0
    with engine(checkpoint, Ruled(Elastic(ratio=ratio), HalfStore())) as run:
        for ids in images:
            pass_prompt(run, ids)
            steps = answered(run, ids)
            for t in range(reader.N_PROMPT, reader.N_TOKENS):
                wrong += sum(len(head) != math.ceil(ratio * t) for head in held(run))
                next(steps, None)
    return wrong


def observations(checkpoint: Checkpoint, policy: Policy, ids: Ids) -> int:
    """How often attention is asked for probabilities while the answer's tokens pass."""
    with engine(checkpoint, Ruled(policy, HalfStore())) as run:
        pass_prompt(run, ids)
        with mock.patch.object(ops, "attention_mass", wraps=ops.attention_mass) as asked:
            for _ in answered(run, ids):
                pass
    return asked.call_count


def compared(losses: dict[str, F64], ratio: float) -> list[dict[str, Any]]:
    """What the paper says of elastic, image by image; and its gate here, the window of last ones."""
    found = []
    for ours, other in COMPARED:
        less = losses[ours] - losses[other]
        error = less.std(ddof=1) / math.sqrt(len(less))
        text = f"ratio {ratio}: nats a token, {ours} less {other} (± {error:.4f})"
        found.append(claim(text, float(less.mean()), at_most=0.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--work", type=Path, default=Path("build/fashion_reader"))
    parser.add_argument("--minutes", type=float, default=3.0, help="of processor time, to train for")
    parser.add_argument("--n", type=int, default=100, help="test images")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    args = parser.parse_args()
    if not (args.work / "config.json").exists():
        reader.train(args.images, args.work, args.minutes)
    images = reader.sequences(args.images, "t10k", args.n)
    config = {
        "n": args.n, "ratios": args.ratios, "minutes": args.minutes, "prompt": reader.N_PROMPT,
        "answer": reader.N_TOKENS - reader.N_PROMPT, "levels": reader.LEVELS, "shape": reader.SHAPE,
    }  # fmt: skip
    card("elastic on images", config)
    whole = Ruled(None, HalfStore())
    with Checkpoint(str(args.work)) as checkpoint:
        all_kept = differences(checkpoint, Ruled(Elastic(ratio=1.0), HalfStore()), whole, images[:3])
        asked = {str(p): observations(checkpoint, p, images[0]) for p in (Elastic(), H2O(keep=reader.N_PROMPT))}
        claims = [
            claim("ratio 1: largest difference of logits to the cache that keeps all", all_kept, at_most=0.0),
            claim("probabilities that attention is asked for along an answer", asked[str(Elastic())], at_most=0),
        ]
        results: dict[str, Any] = {}
        results["full"], _ = measured(checkpoint, whole, images)
        tell("full", results["full"])
        claims.append(
            claim("full: share of the read-out that is likeliest", results["full"]["read-out right"], at_least=0.9)
        )
        for ratio in args.ratios:
            wrong = wrong_counts(checkpoint, ratio, images[:3])
            claims.append(claim(f"ratio {ratio}: counts of entries other than ⌈ratio · t⌉", wrong, at_most=0))
            losses: dict[str, F64] = {}
            for name, policy in arms(ratio).items():
                results[f"{name} at {ratio}"], losses[name] = measured(checkpoint, Ruled(policy, HalfStore()), images)
                tell(f"{name} at {ratio}", results[f"{name} at {ratio}"])
            claims += compared(losses, ratio)
            record = {"config": config, "paper": PAPER, "asked": asked, "results": results, "claims": claims}
            save("kv/elastic_fashion-mnist", record, "torch", "transformers")


def tell(name: str, result: dict[str, Any]) -> None:
    parts = "  ".join(f"{part} {result[f'{part} right']:.3f}" for part in reader.ANSWER)
    print(f"  {name:37} {result['kv_bytes'] / 1024:6.1f} KiB  NLL {result['nll']:.4f}  {parts}")
    print("\n".join(f"  {'':37} {row}" for row in result["kept"]["behind the prompt"]), flush=True)


if __name__ == "__main__":
    main()
