"""KIVI's axes: what keys by channel and values by token lose, beside the other ways round at equal bits.

    python -m benchmarks kv.kivi MODEL NAME --text FILE [--prompt 1024] [--follow 256] [--texts 2] [--words 256]
        [--copies 4] [--folder FOLDER --peer-python PYTHON]

Text behind a prompt, decoded token by token, one sequence a text: the engine's own ``kivi``, rows quantized by token
(``q4``, ``q2``, no last positions of their own) and ``comet`` (both by channel, the last group whole); and by hand,
since the engine has no store for all of them, each way of grouping: *keys, values* by channel or by token. Entries are
rows of 16 bits there that are rounded in place when KIVI would quantize them, to codes of so many bits with a scale and
a minimum in 16 bits for each 32 numbers, so all of these have the same bits, groups and last positions; ``symmetric``
has ranges from -m to m. By hand and by the engine KIVI must be the same.

The peer is transformers' QuantizedCache (``--peer-python`` has transformers and optimum-quanto, FOLDER the same model,
``barefoot export FILE --to barefoot``), as it comes (both by token) and with KIVI's axes, beside its own full cache. It
quantizes all of a prompt, and all anew when as many entries as ``residual`` have come.

Then words copied (:mod:`barefoot.evals.long_context.copying`), the logits of a prompt bit by bit, and the bytes of a
cache for few tokens beside the closed form.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from barefoot.core.model import ModelSpec
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence, log_softmax
from barefoot.evals.long_context.continuation import LEAST
from barefoot.evals.long_context.copying import copying
from barefoot.evals.long_context.sessions import Session
from barefoot.evals.scoring import spread_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.ruled import Ruled
from barefoot.kv.slots import Slots
from barefoot.kv.storage import F32, I32, U8, Shape, Take
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.kivi import Kivi
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, child, claim, save
from benchmarks.kv.in_step import CHUNK, engine, in_step

F16 = npt.NDArray[np.float16]
BITS = (2, 4)
GROUP, RESIDUAL, VALUES = 32, Kivi.residual, 32  # numbers of a range; last keys; values that are sealed at a time
WORKER = Path(__file__).with_name("quantized_cache_worker.py")
KIVI, SWAPPED, BY_TOKEN, SYMMETRIC = "channel, token", "token, channel", "token, token", "channel, token, symmetric"
PAPER = "Llama-2-7B, 2 bits: CoQA 63.9 to 63.1, GSM8K 13.5 to 12.7; keys by token lose several times as much"


def rounded(x: F32, bits: int, symmetric: bool) -> F32:
    """Numbers (…, n) as codes of groups of ``GROUP`` along the last axis give them back."""
    parts = x.reshape(*x.shape[:-1], -1, GROUP)
    low, high = parts.min(axis=-1, keepdims=True), parts.max(axis=-1, keepdims=True)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    step = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((parts - low) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    return np.asarray((codes * step + low).reshape(x.shape), np.float32)


@dataclass(frozen=True)
class Rounded(HalfStore):
    """Rows that are rounded in place when ``kivi`` would quantize them."""

    rows: ClassVar[bool] = False

    bits: int = 2
    by_channel: tuple[bool, bool] = (True, False)  # keys, values
    symmetric: bool = False

    def storage(self) -> type[RoundedRows]:
        return RoundedRows

    def round(self, rows: F16, by_channel: bool) -> F32:
        """Rows (n_kv_heads, n, head_dim)."""
        x = rows.astype(np.float32)
        if by_channel:
            return rounded(x.swapaxes(1, 2), self.bits, self.symmetric).swapaxes(1, 2)
        return rounded(x, self.bits, self.symmetric)


class RoundedRows(Slots):
    """No policy sends anything away, so slots are positions."""

    def __init__(self, shape: Shape, store: Rounded, take: Take) -> None:
        super().__init__(shape, store, take)
        self._store = store
        self._sealed = np.zeros((shape.n_layers, 2), np.int64)  # keys and values of each layer

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        super().place(layer, stay, position, keys, values)
        self._seal(layer)

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        super().append(layer, k, v, position)
        self._seal(layer)

    def clear(self) -> None:
        super().clear()
        self._sealed[:] = 0

    def _seal(self, layer: int) -> None:
        region, stops = self.regions[layer], n_sealed(self.n(layer))
        for i, (stored, stop) in enumerate(zip((region.keys, region.values), stops, strict=True)):
            start = self._sealed[layer, i]
            if start < stop:
                rows = stored.view(np.float16)[:, start:stop]
                rows[...] = self._store.round(rows, self._store.by_channel[i])
                self._sealed[layer, i] = stop


def n_sealed(n: int) -> tuple[int, int]:
    """Keys and values that are quantized, of ``n`` entries."""
    return (n - 1) // RESIDUAL * RESIDUAL, max(0, (n - 1 - RESIDUAL) // VALUES * VALUES)


def by_hand(bits: int) -> dict[str, Rounded]:
    return {
        KIVI: Rounded(bits=bits),
        SWAPPED: Rounded(bits=bits, by_channel=(False, True)),
        BY_TOKEN: Rounded(bits=bits, by_channel=(False, False)),
        "channel, channel": Rounded(bits=bits, by_channel=(True, True)),
        SYMMETRIC: Rounded(bits=bits, symmetric=True),
    }


def by_engine(bits: int) -> tuple[str, ...]:
    return f"kivi(bits={bits})", f"comet(bits={bits},group={GROUP})", f"q{bits}"


class Measure:
    """Texts, and what the full cache says of them."""

    def __init__(self, checkpoint: Checkpoint, texts: list[list[int]], n_prompt: int, n_threads: int) -> None:
        self.checkpoint, self.texts, self.n_prompt, self.n_threads = checkpoint, texts, n_prompt, n_threads
        vocab = model_spec(checkpoint).vocab_size
        self.expected = np.empty((len(texts), len(texts[0]) - n_prompt - 1, vocab), np.float16)

        def keep(text: int, at: int, logits: F32) -> None:
            self.expected[text, at - n_prompt - 1] = np.maximum(log_softmax(logits), LEAST)[0]

        self._run(parse_kv("f16"), keep)

    def __call__(self, name: str, kv: KVStore) -> dict[str, float]:
        divergence = Divergence()

        def compare(text: int, at: int, logits: F32) -> None:
            expected = self.expected[text, at - self.n_prompt - 1][None].astype(np.float32)
            divergence.add(expected, logits, np.array([self.texts[text][at]]))

        n_bytes = self._run(kv, compare)
        nll, full = (float(np.concatenate(each).mean()) for each in (divergence.nlls, divergence.reference_nlls))
        found = {"rise_of_nll": nll - full, "kl": divergence.summary["kl_mean"], "nll": nll, "full_nll": full}
        print(f"  {name:36} KL {found['kl']:.5f}  NLL {nll - full:+.4f}", flush=True)
        return found if isinstance(kv, Rounded) else {"kv_bytes": n_bytes, **found}

    def _run(self, kv: KVStore, take: Any) -> int:
        n = len(self.texts)
        with engine(self.checkpoint, kv, len(self.texts[0]), n, self.n_threads) as run:
            in_step(run, self.texts, self.n_prompt, take)
            return run.arena.used_by_owner()["kv"] // n


def copied(checkpoint: Checkpoint, sessions: Sequence[Session], kv: str, n_threads: int) -> float:
    """The share of words that are foreseen, of sessions that are equally long."""
    texts = [[*one.prompt, *one.turns[0].opening, *one.turns[0].answer] for one in sessions]
    n_prompt, n_words, right = len(sessions[0].prompt), len(sessions[0].turns[0].answer), 0

    def look(text: int, at: int, logits: F32) -> None:
        nonlocal right
        right += at >= len(texts[0]) - n_words and int(logits.argmax()) == texts[text][at]

    with engine(checkpoint, parse_kv(kv), len(texts[0]), len(texts), n_threads) as run:
        in_step(run, texts, n_prompt, look)
    return right / (n_words * len(texts))


def same_logits(checkpoint: Checkpoint, ids: Sequence[int], n_threads: int) -> float:
    """The share of a prompt's positions whose logits are the same bits as those of the 16-bit cache."""

    def logits(kv: str) -> F32:
        found = np.empty((len(ids), model_spec(checkpoint).vocab_size), np.float32)

        def take(start: int, rows: F32) -> None:
            found[start : start + len(rows)] = rows

        with engine(checkpoint, parse_kv(kv), len(ids), 1, n_threads) as run:
            run.prefill(ids, all_logits=take)
        return found

    return float((logits("kivi").view(np.uint32) == logits("f16").view(np.uint32)).all(axis=1).mean())


def stated_bytes(spec: ModelSpec, n: int, bits: int) -> dict[str, int]:
    """Of ``n`` tokens, from the closed forms: what is here, and the paper's, where a layer sees all positions.

    Here is room for one block of keys and of values at least, and for ``VALUES`` values more; the paper's last keys
    are ``n`` mod R, its last values R.
    """
    heads, dim, ruled = spec.n_kv_heads, spec.head_dim, Ruled.ruled(spec)
    (n_keys, n_values), row = n_sealed(n), 2 * dim
    keys = max(1, n_keys // GROUP) * (4 * dim + GROUP * dim * bits // 8) + RESIDUAL * row
    values = max(1, n_values // VALUES) * (4 * VALUES * dim // GROUP + VALUES * dim * bits // 8)
    here = len(ruled) * heads * (keys + values + (RESIDUAL + VALUES) * row)
    paper_keys, paper_values = n - n % RESIDUAL, max(0, n - RESIDUAL)
    codes = (paper_keys + paper_values) * dim * (bits / 8 + 4 / GROUP)
    windows = sum(
        2 * heads * min(n, layer.window - 1 + CHUNK) * row for layer in spec.layers if layer.window is not None
    )
    paper = round(len(ruled) * heads * (codes + (RESIDUAL + RESIDUAL + 1) * row))
    return {"stated": here + windows, "paper": paper + windows}


def sizes(checkpoint: Checkpoint, ids: Sequence[int], n_threads: int) -> dict[str, dict[str, Any]]:
    """Bytes of a cache for so many tokens, allocated and stated, and what of them is quantized when they are there."""
    spec, found = model_spec(checkpoint), {}
    for bits in BITS:
        for n in (1, RESIDUAL - 1, RESIDUAL, RESIDUAL + 1, 2 * RESIDUAL):
            with engine(checkpoint, Kivi(bits=bits), n, 1, n_threads) as run:
                run.prefill(ids[: max(1, n - 2)])
                for token in ids[max(1, n - 2) : n]:
                    run.decode(token)
                assert run._by_layer is not None
                counters = run._by_layer.caches[0].header()["entries"]
                there = [sorted(set(counters[name])) for name in ("n", "keys", "values")]
                assert there == [[n], *([each] for each in n_sealed(n))], there
                allocated = run.arena.used_by_owner()["kv"]
            found[f"{bits} bits, {n} tokens"] = {"allocated": allocated, **stated_bytes(spec, n, bits)}
    return found


def peer(
    folder: str, python: str, texts: list[list[int]], n_prompt: int, n_threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rises of NLL of transformers' QuantizedCache by bits and axes, and its settings."""
    shared = {"backend": "quanto", "q_group_size": GROUP, "residual_length": RESIDUAL}
    axes = {BY_TOKEN: (0, 0), KIVI: (-1, 0)}
    arms = {
        f"{bits} bits, {way}": {**shared, "nbits": bits, "axis_key": keys, "axis_value": values}
        for bits in BITS
        for way, (keys, values) in axes.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "texts.json"
        path.write_text(json.dumps(texts))
        settings = {"folder": folder, "texts": str(path), "prompt": n_prompt, "arms": arms, "threads": n_threads}
        done = child(WORKER, settings, python)
    if "refused" in done:
        print(f"  QuantizedCache refuses: {done['refused']}", flush=True)
        return done, arms
    full = done["nll"].pop("full")
    rises = {name: nll - full for name, nll in done["nll"].items()}
    print("  QuantizedCache: " + "  ".join(f"{name} {rise:+.4f}" for name, rise in rises.items()), flush=True)
    return {"versions": done["versions"], "full_nll": full, "rise_of_nll": rises}, arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: kv_kivi_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--follow", type=int, default=256)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder")
    parser.add_argument("--peer-python")
    args = parser.parse_args()
    left_out = ("model", "name", "folder", "peer_python")
    config = {key: value for key, value in vars(args).items() if key not in left_out}
    config |= {"text": Path(args.text).name, "group": GROUP, "residual": RESIDUAL}
    card(f"axes of codes on {args.name}", config)
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        tokenizer, n = load_tokenizer(checkpoint), args.prompt + args.follow + 1
        texts = spread_windows(read_text(args.text), tokenizer, n, args.texts).tolist()
        results["bytes"] = sizes(checkpoint, texts[0], args.threads)
        results["same_logits"] = same_logits(checkpoint, texts[0][: args.prompt], args.threads)
        measure = Measure(checkpoint, texts, args.prompt, args.threads)
        for bits in BITS:
            arms: dict[str, KVStore] = {**by_hand(bits), **{kv: parse_kv(kv) for kv in by_engine(bits)}}
            results[f"{bits} bits"] = {name: measure(f"{bits} bits, {name}", kv) for name, kv in arms.items()}
        del measure
        sessions, results["copies"] = [copying(tokenizer, args.words, seed) for seed in range(args.copies)], {}
        for kv in ("f16", "kivi(bits=4)", "q4", "kivi(bits=2)", "q2"):
            results["copies"][kv] = copied(checkpoint, sessions, kv, args.threads)
            print(f"  {kv:36} {results['copies'][kv]:.3f} of the words", flush=True)
    if args.folder and args.peer_python:
        found, config["peer"] = peer(args.folder, args.peer_python, texts, args.prompt, args.threads)
        results["peer"] = found
    record = {"config": config, "paper": PAPER, "results": results, "ratios": ratios(results)}
    save(f"kv/kivi_{args.name}", {**record, "claims": claims(results)})


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """What the ways by hand lose, of what the engine's KIVI loses; in 4 bits that is too little for one of NLL."""
    found = {}
    for bits, metric, what in ((2, "rise_of_nll", "rise of NLL"), (2, "kl", "KL"), (4, "kl", "KL")):
        arms = results[f"{bits} bits"]
        for arm in by_hand(bits):
            found[f"{bits} bits: {what} of {arm}"] = arms[arm][metric] / arms[f"kivi(bits={bits})"][metric]
    return found


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    two, engines = results["2 bits"], "kivi(bits=2)"
    found = [
        claim(f"2 bits: {what} by the engine, less {arm}'s", two[engines][metric] - two[arm][metric], at_most=0.0)
        for metric, what in (("rise_of_nll", "rise of NLL"), ("kl", "KL"))
        for arm in (BY_TOKEN, SWAPPED, SYMMETRIC)
    ]
    rise, words = results["4 bits"]["kivi(bits=4)"]["rise_of_nll"], results["copies"]
    found.append(claim("4 bits: rise of NLL by the engine", rise, at_most=0.03))
    found.append(
        claim("4 bits: words copied, of the full cache's", words["kivi(bits=4)"] / words["f16"], at_least=0.95)
    )
    found.append(claim("positions of a prompt whose logits are the same bits", results["same_logits"], at_least=1.0))
    apart = max(abs(each["allocated"] - each["stated"]) for each in results["bytes"].values())
    found.append(claim("bytes allocated beyond or below the closed form, at most", apart, at_most=0))
    hand = two[KIVI]["kl"] / two[engines]["kl"]
    found.append(claim("2 bits: KL by hand, of the engine's", hand, at_least=0.9, at_most=1.1))
    return found


if __name__ == "__main__":
    main()
