"""Channels of keys in the order of their sizes (K-sort) for block floating point: errors of scores, and perplexity.

    python -m benchmarks kv.key_order MODEL NAME --text FILE [--tokens 2048] [--windows 2]

By hand, in layers that see all positions: the squared error of the scores of a text's second half when keys are blocks
of 32 or 64 channels with a common exponent, in the order of the file, of the weights (which the engine takes), of the
weights with the channels together that RoPE turns together (as an order of the weights' rows must have them), of what
the first half's keys measured, and by lot; and in rows of 4-bit integers. By the engine: that an order alone changes
neither logits nor greedy tokens (in rows of float32), and perplexity and KL of the store with and without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.engine import key_order
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import score, spread_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f32 import FloatStore
from barefoot.ops import kvrows
from barefoot.plan.job import parse_kv
from barefoot.weights.folds import Heads
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import Attended, attended

F32 = npt.NDArray[np.float32]

STORES = ("f32", "bfp4", "bfp4(sort=true)", "q4")
BLOCKS = (32, 64)
N_GREEDY = 64
NOISE = 1.01  # of perplexity, between orders that are equally good


class Sorted(FloatStore):
    """Rows of float32 with channels in the order of their sizes."""

    @property
    def sorts_keys(self) -> bool:
        return True


def as_blocks(keys: F32, n: int) -> F32:
    """Keys (..., d) as blocks of ``n`` channels with a common exponent give them back, 4 bits each."""
    parts = keys.reshape(*keys.shape[:-1], -1, n)
    largest = np.abs(parts).max(axis=-1, keepdims=True)
    step = np.ldexp(np.float32(1), np.frexp(np.where(largest > 0, largest, 1))[1] - 3)
    return np.asarray((np.clip(np.rint(parts / step), -7, 7) * step).reshape(keys.shape), np.float32)


def score_error(layer: Attended, keys: F32, first: int) -> float:
    """Mean square of what scores of tokens from ``first`` on lose with other ``keys``, over what each can see."""
    total, count = 0.0, 0
    for head in range(len(layer.q)):
        own = head // layer.sharing
        lost = layer.q[head, first:] @ (keys[own] - layer.k[own]).T * layer.scale
        seen = np.arange(lost.shape[1]) <= np.arange(first, first + len(lost))[:, None]
        total, count = total + float(np.square(lost[seen], dtype=np.float64).sum()), count + int(seen.sum())
    return total / count


def errors(model: str, ids: list[int], checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Of each layer that sees all positions, by how keys are kept."""
    spec, found, half = model_spec(checkpoint), {}, len(ids) // 2
    rng = np.random.default_rng(0)
    layers = [i for i, layer in enumerate(spec.layers) if layer.window is None]
    for number, layer in zip(layers, attended(model, ids), strict=True):
        measured, pairs = np.square(layer.k[:, :half]).mean(axis=1), Heads.of(spec, number).factor_of_channel
        by_weights = key_order.sizes_by_weights(checkpoint, spec, number)
        in_pairs = np.array([np.bincount(pairs, own)[pairs] for own in by_weights], np.float32)
        orders = {
            "file": np.tile(np.arange(spec.head_dim), (spec.n_kv_heads, 1)),
            "weights": key_order.by_size(by_weights).astype(np.int64),
            "weights, in pairs": key_order.by_size(in_pairs).astype(np.int64),
            "measured": key_order.by_size(measured).astype(np.int64),
            "lot": np.array([rng.permutation(spec.head_dim) for _ in range(spec.n_kv_heads)]),
        }
        for name, order in orders.items():
            sorted_keys = np.take_along_axis(layer.k, order[:, None], axis=2)
            for n in BLOCKS:
                back = np.empty_like(layer.k)
                np.put_along_axis(back, order[:, None], as_blocks(sorted_keys, n), axis=2)
                found.setdefault(f"{n}, {name}", []).append(score_error(layer, back, half))
        rows = kvrows.decode("q4", kvrows.encode("q4", layer.k), spec.head_dim)
        found.setdefault("q4", []).append(score_error(layer, rows, half))
    return found


def greedy(checkpoint: Checkpoint, kv: KVStore, prompt: list[int]) -> tuple[F32, list[int]]:
    """Logits behind a prompt and behind each token of the answer, and the answer."""
    config = EngineConfig(len(prompt) + N_GREEDY, kv, {}, activations="float32", n_threads=1)
    with Engine(checkpoint, model_spec(checkpoint), config) as engine:
        rows, answer = [engine.prefill(prompt).copy()], []
        for _ in range(N_GREEDY):
            answer.append(int(rows[-1].argmax()))
            rows.append(engine.decode(answer[-1]).copy())
    return np.array(rows), answer


def perplexities(checkpoint: Checkpoint, texts: list[list[int]]) -> dict[str, dict[str, float]]:
    spec, n = model_spec(checkpoint), len(texts[0])

    def engine(kv: str) -> Engine:
        return Engine(checkpoint, spec, EngineConfig(n, parse_kv(kv), {}, 128, "float32", n_logits=64, n_threads=1))

    found = {}
    with engine("f16") as reference:
        for kv in STORES:
            with engine(kv) as own:
                found[kv] = score(texts, own, reference)
            print(f"  {kv:18} PPL {found[kv]['perplexity']:.4f}  KL {found[kv]['kl_mean']:.5f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: kv_key_order_NAME")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--windows", type=int, default=2, help="of so many tokens, of which the second halves are scored"
    )
    args = parser.parse_args()
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer, text = model_spec(checkpoint), load_tokenizer(checkpoint), read_text(args.text)
        config: dict[str, Any] = {
            "text": Path(args.text).name,
            "tokens": args.tokens,
            "windows": args.windows,
            "head_dim": spec.head_dim,
            "n_kv_heads": spec.n_kv_heads,
        }
        card(f"the order of keys' channels on {args.name}", config)
        texts = spread_windows(text, tokenizer, args.tokens, args.windows).tolist()
        (plain, said), (ordered, same) = (greedy(checkpoint, kv, texts[0][:256]) for kv in (FloatStore(), Sorted()))
        apart = float(np.abs(ordered - plain).max() / np.abs(plain).max())
        lost = errors(args.model, texts[0], checkpoint)
        mean = {name: float(np.mean(each)) for name, each in lost.items()}
        for name, value in mean.items():
            print(f"  squared error of scores, {name:20} {value:.6f}", flush=True)
        found = perplexities(checkpoint, texts)
    by_order = {
        f"{n}: file's / {name}": float(np.exp(np.mean(np.log(np.divide(lost[f"{n}, file"], lost[f"{n}, {name}"])))))
        for n in BLOCKS
        for name in ("weights", "weights, in pairs", "measured", "lot")
    }
    sorted_ppl, ppl = (found[kv]["perplexity"] for kv in ("bfp4(sort=true)", "bfp4"))
    claims = [
        claim("an order alone: largest change of logits, of the largest", apart, at_most=1e-4),
        claim("an order alone: greedy tokens that are the same", float(np.mean(np.equal(said, same))), at_least=1.0),
        claim(
            "32 channels: error of scores, file's order / measured order", by_order["32: file's / measured"], at_least=1
        ),
        claim(
            "32 channels: error of scores, file's order / weights' order", by_order["32: file's / weights"], at_least=1
        ),
        claim("perplexity, sorted / not", sorted_ppl / ppl, at_most=NOISE),
    ]
    results = {"score_errors": lost, "mean_score_errors": mean, "ratios_of_layers": by_order, "stores": found}
    save(f"kv/key_order_{args.name}", {"config": config, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
