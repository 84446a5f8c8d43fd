"""H2O beside first, last and random positions: likelihood, the full cache's attention that it keeps, and bytes.

    python -m benchmarks kv.h2o MODEL NAME --text FILE [--prompt 1024] [--follow 128] [--texts 3] [--generate 4096]

Likelihood and mass are of real text behind prompts of which a tenth, a fifth and two fifths stay, decoded token by
token, so that entries go while it decodes. Mass: of what each token attends to under the full cache, the part on
entries that the engine has for it under the policy, itself included; the mean over tokens, query heads, layers that see
all positions, and texts. Bytes: of a greedy generation behind a prompt, after each token, with weights in 8 bits, on
which a cache's bytes don't depend.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.measure import resident
from barefoot.core.model import ModelSpec
from barefoot.engine.runner import Engine
from barefoot.evals.long_context.continuation import diverge, passages, reference
from barefoot.evals.long_context.drivers import Floats, Take
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.entries import NONE
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import F32, F64, attended
from benchmarks.kv.policies import LAST, PAPER, engine, named
from benchmarks.kv.snapkv import kv_bytes, opened, slots

SHARES = (0.1, 0.2, 0.4)
OURS, SINKS, RANDOM = "h2o(keep=KEEP)", "sinks(keep=KEEP)", "random(keep=KEEP)"
ARMS = (OURS, SINKS, LAST, RANDOM)


class Watched:
    """A driver that adds up how much of the full cache's attention its entries have.

    Parameters
    ----------
    shares : of each text in turn, what its decoded tokens give each position under the full cache, float32 (layers,
        n_heads, decoded tokens, tokens).
    """

    def __init__(self, engine: Engine, shares: Sequence[F32]) -> None:
        self.spec: ModelSpec = engine.spec
        self._engine, self._texts, self._shares = engine, iter(shares), shares[0]
        self._decoded = 0
        self.mass: list[F64] = []  # of each decoded token, (layers,)

    def reset(self) -> None:
        self._engine.reset()
        self._shares, self._decoded = next(self._texts), 0

    def prefill(self, ids: Sequence[int], *, all_logits: Take | None = None) -> Floats:
        return self._engine.prefill(ids, all_logits=all_logits)

    def decode(self, token: int) -> Floats:
        n_layers, n_heads, _, n_tokens = self._shares.shape
        there = np.zeros((n_layers, self.spec.n_kv_heads, n_tokens), bool)
        for layer in range(n_layers):
            for head, own in enumerate(entries(self._engine, layer)):
                there[layer, head, own] = True
        there[:, :, self._engine.position] = True
        given = self._shares[:, :, self._decoded] * there.repeat(n_heads // self.spec.n_kv_heads, axis=1)
        self.mass.append(given.sum(axis=2, dtype=np.float64).mean(axis=1))
        self._decoded += 1
        return self._engine.decode(token)

    def truncate(self, n: int) -> None:
        raise NotImplementedError


def entries(engine: Engine, layer: int) -> list[npt.NDArray[np.int32]]:
    """Positions that each key head has, without those of slots left free."""
    storage = slots(engine)
    pairs = zip(storage.position(layer), storage.free[layer].tolist(), strict=True)
    return [own if free == NONE else np.delete(own, free) for own, free in pairs]


def given(model: str, ids: Sequence[int], n_prompt: int) -> F32:
    """Shares of the tokens from ``n_prompt`` on, (layers, n_heads, tokens that follow, tokens)."""
    layers = attended(model, ids)
    return np.array(
        [[layer.shares(head, n_prompt).astype(np.float32) for head in range(len(layer.q))] for layer in layers]
    )


def generated(checkpoint: Checkpoint, prompt: Sequence[int], keep: int, n: int, n_threads: int) -> dict[str, Any]:
    """``n`` tokens, greedily: bytes of the cache and entries of a key head, the fewest and the most seen."""
    context = len(prompt) + n
    with opened(checkpoint, named(OURS, 0, keep), context, n_threads) as run:
        token = int(run.prefill(prompt).argmax())
        before, held, counts = resident(), set(), set()
        for _ in range(n):
            token = int(run.decode(token).argmax())
            held.add(kv_bytes(run)["held"])
            counts |= {len(own) for layer in range(len(slots(run).regions)) for own in entries(run, layer)}
        after, found, spec = resident(), kv_bytes(run), run.spec
        of_entry = 2 * 2 * spec.head_dim + 4 + 4  # two halves' rows, a position, a score
        formula = len(slots(run).regions) * spec.n_kv_heads * (keep + 1) * of_entry + found["windows"]
    grown = None if before is None or after is None else after.total - before.total
    return {
        "tokens": n,
        "keep": keep,
        "held": sorted(held),
        "predicted": found["predicted"],
        "formula": formula,
        "full_cache": sum(term.bytes for term in parse_kv("f16").terms(spec, context, run.config.chunk)),
        "entries": sorted(counts),
        "resident_growth": grown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: h2o_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--follow", type=int, default=128)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--generate", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    config = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name, "shares": SHARES}
    card(f"heavy hitters on {args.name}", config)
    sizes = [(share, round(share * args.prompt)) for share in SHARES]
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        texts = passages(read_text(args.text), load_tokenizer(checkpoint), args.prompt, args.follow, args.texts)
        n = args.prompt + args.follow
        with engine(checkpoint, "f16", n, args.threads, 1) as run:
            references = [reference(run, text) for text in texts]
        shares = [given(args.model, text.prompt + text.continuation[:-1], args.prompt) for text in texts]
        for kv in (named(arm, *size) for size in sizes for arm in ARMS):
            with engine(checkpoint, kv, n, args.threads, 1) as run:
                n_bytes, watched = kv_bytes(run), Watched(run, shares)
                along = diverge(watched, texts, references)
            mass = np.mean(watched.mass, axis=0)
            rise = along["nll"] - along["reference_nll"]
            results[kv] = {"kv_bytes": n_bytes, "rise_of_nll": rise, "kl": along["kl_mean"], "nll": along["nll"]}
            results[kv] |= {"mass": float(mass.mean()), "mass_by_layer": mass.tolist()}
            size = n_bytes["held"] / 2**20
            print(f"  {kv:28} {size:6.2f} MiB  NLL {rise:+.4f}  mass {mass.mean():.4f}", flush=True)
        del shares
        made = generated(checkpoint, texts[0].prompt, sizes[1][1], args.generate, args.threads)
        print(f"  generation: {made}", flush=True)
    record = {"config": config, "paper": PAPER["h2o"], "results": results, "generation": made}
    save(f"kv/h2o_{args.name}", {**record, "claims": claims(results, made, sizes)})


def claims(results: dict[str, Any], made: dict[str, Any], sizes: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    found = []
    for share, keep in sizes:
        each = {arm: results[named(arm, share, keep)] for arm in ARMS}
        for arm, what in ((LAST, "last positions alone"), (RANDOM, "random ones")):
            apart = each[OURS]["rise_of_nll"] - each[arm]["rise_of_nll"]
            found.append(claim(f"NLL with {share} of the entries, h2o less {what}", apart, at_most=0.0))
        apart = each[OURS]["mass"] - each[SINKS]["mass"]
        found.append(claim(f"mass with {share} of the entries, h2o less first and last ones", apart, at_least=0.0))
    same = {
        "the most less the fewest bytes that arrays hold": made["held"][-1] - made["held"][0],
        "bytes that arrays hold, less those predicted": made["held"][-1] - made["predicted"],
        "bytes that arrays hold, less the formula's": made["held"][-1] - made["formula"],
        "entries of a key head, less those that stay": made["entries"][-1] - made["keep"],
        "the same, the fewest": made["entries"][0] - made["keep"],
    }
    return found + [claim(f"{made['tokens']} tokens: {what}", x, at_least=0, at_most=0) for what, x in same.items()]


if __name__ == "__main__":
    main()
