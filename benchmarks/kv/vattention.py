"""vAttention on the host: logits, bytes and waits for pages of a served trace, and a step beside a paged gather.

    python -m benchmarks kv.vattention MODEL.gguf NAME [--rounds 5]

40 requests of unequal length pass through 8 sequences of 2,048 positions, once with all keys and values resident and
once committed as they grow: logits are compared bit for bit, resident memory with the closed form. The lengths of that
run are then replayed, without the model, under every way to reclaim, with and without the thread, and at the end a
second wave over the slots of a first. Imitations: all bytes resident, and blocks of 16 tokens that are gathered into
dense arrays before the same attention, as long as a kernel knows no blocks.

``--rounds`` above 0 also times that gather: a step's attention of all layers over contiguous rows, and over blocks.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from barefoot import ops
from barefoot.core.measure import resident_at
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint, kv_tensors
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.placement.geometry import Geometry, layered, sliced
from barefoot.kv.placement.pages import HostPages
from barefoot.kv.placement.vattention import VAttention
from barefoot.kv.stores.f16 import HalfStore
from benchmarks.harness import card, claim, rounds, save

CONTEXT, N_SEQUENCES, N_REQUESTS, BLOCK = 2048, 8, 40, 16
PAPER = {
    "first version, A100, against vLLM": "decode up to 1.97 times, prefill up to 3.92 times as fast",
    "later version": "up to 1.23 times end to end, 1.36 times prefill",
    "of these": "from notes on the paper, not looked up in its text again",
    "smallest page of a GPU": "2 MiB, 64 KiB with a changed driver",
}
Step = tuple[int, ...]  # tokens of each sequence; a sequence that is back at 0 has ended


def requests(seed: int) -> list[tuple[int, int]]:
    """(prompt, tokens in all) of each."""
    rng = random.Random(seed)
    totals = [min(CONTEXT, max(24, int(rng.lognormvariate(5.3, 0.8)))) for _ in range(N_REQUESTS)]
    return [(total - min(total // 2, rng.randint(16, 48)), total) for total in totals]


class Served:
    """The trace, passed through an engine."""

    def __init__(self, run: Engine) -> None:
        self._run, self._digest = run, hashlib.sha256()
        self.steps: list[Step] = []
        waiting = [(i, *each) for i, each in enumerate(requests(24))]
        running: dict[int, tuple[int, int]] = {}
        while waiting or running:
            for sequence in range(N_SEQUENCES):
                if sequence not in running and waiting:
                    number, prompt, total = waiting.pop(0)
                    running[sequence] = (number, total)
                    ids = [(37 * number + 11 * i) % run.spec.vocab_size for i in range(prompt)]
                    self._done(run.prefill(ids, sequence=sequence))
            tokens = {s: (running[s][0] + 7 * run.positions[s]) % run.spec.vocab_size for s in sorted(running)}
            self._done(run.decode_batch(tokens))
            for sequence in [s for s, (_, total) in running.items() if run.positions[s] >= total]:
                del running[sequence]
                run.reset(sequence)
                self.steps.append(run.positions)

    def _done(self, logits: np.ndarray) -> None:
        self._digest.update(logits.tobytes())
        self.steps.append(self._run.positions)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def replay(steps: Sequence[Step], spec: ModelSpec, config: EngineConfig, placement: VAttention) -> dict[str, int]:
    """Counts of the trace's pages, and of readings of what is resident that were not what is committed."""
    pages = HostPages()
    cache = placement.open(kv_tensors(spec, config), N_SEQUENCES, pages)
    geometry, page = cache.geometry, placement.page_bytes
    address, n_bytes = pages.memory.ctypes.data, geometry.n_bytes
    found = {
        "pages waited for": 0,
        "of these, in prefill": 0,
        "most bytes": 0,
        "beyond the closed form": 0,
        "misread": 0,
    }
    before: Step = (0,) * N_SEQUENCES
    for i, after in enumerate(steps):
        for slot, (was, now) in enumerate(zip(before, after, strict=True)):
            if was and not now:
                cache.free(slot)
        waited = cache.n_waited
        cache.step(after)
        if any(now > was + 1 for was, now in zip(before, after, strict=True)):
            found["of these, in prefill"] += cache.n_waited - waited
        committed = cache.committed_bytes
        found["most bytes"] = max(found["most bytes"], committed)
        exact = page * sum(geometry.n_pages(geometry.groups(n)) for n in after)
        found["beyond the closed form"] = max(found["beyond the closed form"], committed - exact)
        if i % 16 == 0:
            found["misread"] += resident_at(address, n_bytes) != committed
        before = after
    found["pages waited for"], found["pages ahead"] = cache.n_waited, cache.n_ahead
    found["pages given back"] = cache.n_released
    cache.trim()
    found["left at the end"] = resident_at(address, n_bytes) or 0
    cache.close()
    return found


def second_wave(spec: ModelSpec, config: EngineConfig, reclaim: str) -> int:
    """Pages committed for eight prompts whose slots eight others have just left."""
    cache = VAttention(reclaim=reclaim, background=False).open(kv_tensors(spec, config), N_SEQUENCES, HostPages())
    rng, before = random.Random(5), 0
    for _ in range(2):
        before, lengths = cache.n_waited, [0] * N_SEQUENCES
        for n in (rng.randint(300, 600) for _ in range(N_SEQUENCES)):
            lengths[cache.alloc(n)] = n
            cache.step(lengths)
        for slot in range(N_SEQUENCES):
            cache.free(slot)
    n_committed = cache.n_waited - before
    cache.close()
    return n_committed


def layouts(steps: Sequence[Step], spec: ModelSpec, config: EngineConfig) -> dict[str, int]:
    """The most bytes that the trace's tokens need at once, by how rows lie and how large pages are."""
    row = config.kv.row_bytes(spec.head_dim)
    wide = spec.n_kv_heads * row
    token = 2 * spec.n_layers * wide
    found = {
        "all resident": N_SEQUENCES * CONTEXT * token,
        "rows alone": max(sum(n) for n in steps) * token,
        f"blocks of {BLOCK}": max(sum(-(-n // BLOCK) for n in step) for step in steps) * BLOCK * token,
    }
    tensors = {
        "a range a head": kv_tensors(spec, config),
        "a range a layer": layered(spec.n_layers, CONTEXT, wide),
        "sliced": sliced(spec.n_layers, CONTEXT, wide),
    }
    for page in (4096, 64 << 10, 2 << 20):
        for name, each in tensors.items():
            geometry = Geometry(each, N_SEQUENCES, page)
            most = max(sum(geometry.n_pages(geometry.groups(n)) for n in step) for step in steps)
            found[f"{name}, pages of {page >> 10} KiB"] = most * page
    return found


class AttentionStep:
    """One decode step's attention of every layer, over contiguous rows and over blocks of the same rows."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, lengths: Step) -> None:
        self._spec, self._lengths, rng = spec, lengths, np.random.default_rng(3)
        self._row = config.kv.row_bytes(spec.head_dim)
        self._cache = VAttention().open(kv_tensors(spec, config), N_SEQUENCES, pages := HostPages())
        self._cache.step(lengths)
        self._arrays = self._cache.geometry.arrays(pages.memory)
        n_blocks = [-(-n // BLOCK) for n in lengths]
        order = rng.permutation(sum(n_blocks))
        ends = np.cumsum(n_blocks)
        self._tables = [order[end - n : end] for n, end in zip(n_blocks, ends, strict=True)]
        shape = (len(order), spec.n_kv_heads, BLOCK, self._row)
        self._blocks = [np.zeros(shape, np.uint8) for _ in self._arrays]
        for array, blocks in zip(self._arrays, self._blocks, strict=True):
            for slot, n in enumerate(lengths):
                rows = rng.standard_normal((spec.n_kv_heads, n, spec.head_dim)).astype(np.float16).view(np.uint8)
                array[slot, :, :n] = rows
                padded = np.zeros((spec.n_kv_heads, n_blocks[slot] * BLOCK, self._row), np.uint8)
                padded[:, :n] = rows
                blocks[self._tables[slot]] = padded.reshape(spec.n_kv_heads, -1, BLOCK, self._row).swapaxes(0, 1)
        n = len(lengths)
        self._dense = [np.zeros(self._arrays[0].shape, np.uint8) for _ in "kv"]
        self._q = rng.standard_normal((n, spec.n_heads * spec.head_dim), np.float32)
        size = ops.attention_scratch_bytes(n, spec.n_heads, spec.n_kv_heads, spec.head_dim, each=True)
        self._scratch = np.empty(size, np.uint8)
        self.gathered_bytes = 2 * spec.n_layers * spec.n_kv_heads * self._row * sum(n_blocks) * BLOCK

    def contiguous(self) -> list[np.ndarray]:
        return [self._attend(*self._arrays[2 * i : 2 * i + 2]) for i in range(self._spec.n_layers)]

    def gathered(self) -> list[np.ndarray]:
        outs = []
        for i in range(self._spec.n_layers):
            for dense, blocks in zip(self._dense, self._blocks[2 * i : 2 * i + 2], strict=True):
                for slot, table in enumerate(self._tables):
                    rows = dense[slot, :, : len(table) * BLOCK]
                    into = rows.reshape(self._spec.n_kv_heads, len(table), BLOCK, self._row)
                    np.copyto(into, blocks[table].swapaxes(0, 1))
            outs.append(self._attend(*self._dense))
        return outs

    def _attend(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        spec, n, out = self._spec, len(self._lengths), np.empty_like(self._q)
        ops.attention_each(
            self._q,
            keys,
            values,
            "f16",
            out,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            capacity=keys.shape[2],
            sequences=list(range(n)),
            positions=[n - 1 for n in self._lengths],
            scale=spec.attn_scale,
            scratch=self._scratch,
        )
        return out

    def close(self) -> None:
        self._cache.close()


def timed(step: AttentionStep, n_rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    def measure(name: str) -> Mapping[str, float]:
        start = time.perf_counter()
        getattr(step, name)()
        return {"ms": 1e3 * (time.perf_counter() - start)}

    return rounds({name: (lambda name=name: measure(name)) for name in ("contiguous", "gathered")}, n_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()

    def served(checkpoint: Checkpoint, config: EngineConfig) -> Served:
        with Engine(checkpoint, model_spec(checkpoint), config) as run:
            return Served(run)

    with Checkpoint(args.model) as checkpoint:
        spec = model_spec(checkpoint)
        config = EngineConfig(CONTEXT, HalfStore(), n_sequences=N_SEQUENCES, n_threads=args.threads)
        static = next(e.bytes for e in footprint(spec, config) if e.owner == "kv")
        lengths = [total for _, total in requests(24)]
        facts = {
            "file": Path(args.model).name,
            "requests": f"{N_REQUESTS}, {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / N_REQUESTS:.0f}",
            "sequences": f"{N_SEQUENCES} of {CONTEXT} positions, f16: {static} bytes when all are resident",
        }
        card(f"kv: vAttention, {args.name}", facts)
        plain = served(checkpoint, config)
        grown = served(checkpoint, EngineConfig(**vars(config) | {"kv_placement": VAttention()}))
    assert plain.steps == grown.steps
    results: dict[str, Any] = {}
    for reclaim in ("demand", "idle", "eager"):
        for thread in (True, False):
            placement = VAttention(reclaim=reclaim, background=thread)
            results[f"{reclaim}, {'with' if thread else 'no'} thread"] = replay(plain.steps, spec, config, placement)
    for name, found in results.items():
        print(f"  {name}: {found}")
    most = layouts(plain.steps, spec, config)
    print(f"  most bytes at once: {most}")
    waves = {reclaim: second_wave(spec, config, reclaim) for reclaim in ("demand", "eager")}
    step = AttentionStep(spec, config, max(plain.steps, key=sum))
    same = all(np.array_equal(a, b) for a, b in zip(step.contiguous(), step.gathered(), strict=True))
    ratios: dict[str, float] = {"most bytes / all resident": round(most["a range a head, pages of 4 KiB"] / static, 4)}
    if args.rounds:
        times = timed(step, args.rounds)
        results["attention of a step"] = times
        ratios["contiguous / gathered, time"] = round(
            times["contiguous"]["ms"]["median"] / times["gathered"]["ms"]["median"], 3
        )
    step.close()
    exact, left = results["eager, no thread"], results["demand, with thread"]["left at the end"]

    def in_decode(name: str) -> int:
        return int(results[name]["pages waited for"] - results[name]["of these, in prefill"])

    claims = [
        claim("logits of the trace are those of resident rows", plain.digest == grown.digest, at_least=1),
        claim("bytes beyond the closed form, eager without the thread", exact["beyond the closed form"], at_most=0),
        claim("readings of the system that differ", sum(r["misread"] for r in results.values() if "misread" in r),
              at_most=0),
        claim("resident when all requests have ended and their pages were reclaimed", left, at_most=0),
        claim("most bytes against all resident", exact["most bytes"] / static, at_most=0.5),
        claim("pages that decode steps waited for, with the thread", in_decode("eager, with thread"), at_most=0),
        claim("the same without it", in_decode("eager, no thread"), at_least=1),
        claim("second wave: pages committed, deferred against eager", waves["demand"] / waves["eager"], at_most=0.2),
        claim("attention over gathered blocks is that over contiguous rows", same, at_least=1),
    ]  # fmt: skip
    if args.rounds:
        claims.append(claim("a step's attention against gathered blocks", ratios["contiguous / gathered, time"],
                            at_most=1.0))  # fmt: skip
    save(
        f"kv/vattention_{args.name}",
        {
            "config": {"context": CONTEXT, "sequences": N_SEQUENCES, "kv": "f16", "threads": args.threads},
            "card": facts,
            "paper": PAPER,
            "results": results,
            "most bytes at once": most,
            "pages of the second wave": waves,
            "bytes that a gather of blocks copies in the largest step": step.gathered_bytes,
            "ratios": ratios,
            "claims": claims,
        },
    )


if __name__ == "__main__":
    main()
