"""MiniCache by depth: how alike adjacent layers' keys and values are, and what sharing their directions costs.

    python -m benchmarks kv.minicache MODEL NAME --text FILE [--pairs 1 2 3 5 7] [--length 1024] [--tokens 256]

First the curve: of a prompt, the mean cosine between the keys (and values) of each layer and of the one before. Then,
with the deepest 1, 2, … pairs of layers merged, the rise of the negative log-likelihood of what goes on behind the
prompt, token by token: interpolated directions with both lengths and the most different entries kept, the same without
these, and the cheap imitations: the plain mean of both layers' rows, and the second layer's for both. Nothing waits
unmerged (``recent=1``) in any of them. Bytes are those of the cache while it decodes.

``--tie`` measures another model, where layers are alike: of the deepest pairs the second layer has the first one's
matrices for keys and values, so that only what the layer itself adds to the hidden states tells them apart. Its own
full cache is the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.long_context.continuation import Passage, diverge, passages, reference
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.minicache import F32, Merged, MiniCache, angles
from barefoot.ops import kvrows
from benchmarks.harness import card, claim, save

CHUNK = 128
PAPER = {
    "quality": "half of the layers merged, near-lossless: LLaMA-2/3 7B and larger, Phi-3, Mistral, Mixtral",
    "bytes": "1.53 times fewer from merging alone (LLaMA-2-7B, ShareGPT); 5.02 with 4 bits",
}


@dataclass(frozen=True)
class PlainMean(MiniCache):
    """Both layers have the mean of their rows."""

    def merge(self, first: F32, second: F32) -> Merged:
        return Merged((first + second) / 2, np.ones((2, *first.shape[:-1]), np.float32))


@dataclass(frozen=True)
class DeeperOnly(MiniCache):
    """Both layers have the second one's rows."""

    def merge(self, first: F32, second: F32) -> Merged:
        return Merged(second, np.ones((2, *first.shape[:-1]), np.float32))


def arms(start: int, retain: float) -> dict[str, KVStore]:
    return {
        "minicache": MiniCache(start=start, retain=retain, recent=1),
        "without retention": MiniCache(start=start, retain=0, recent=1),
        "plain mean": PlainMean(start=start, retain=0, recent=1),
        "deeper layer only": DeeperOnly(start=start, retain=0, recent=1),
    }


def engine(checkpoint: Checkpoint, kv: KVStore, passage: Passage, n_threads: int) -> Engine:
    config = EngineConfig(
        context=len(passage.prompt) + len(passage.continuation),
        kv=kv,
        chunk=CHUNK,
        activations="float32",
        n_threads=n_threads,
    )
    return Engine(checkpoint, model_spec(checkpoint), config)


@contextlib.contextmanager
def tied(path: Path, n_pairs: int) -> Iterator[Path]:
    """A copy of a GGUF file where the deepest pairs of layers share the matrices of keys and values."""
    with tempfile.TemporaryDirectory() as folder, Checkpoint(path) as checkpoint:
        copy = Path(shutil.copy(path, folder))
        tensors, n_layers = checkpoint.tensors, model_spec(checkpoint).n_layers
        with copy.open("r+b") as file:
            for layer in range(n_layers - 2 * n_pairs, n_layers, 2):
                for name in ("attn_k.weight", "attn_v.weight"):
                    first, second = (tensors[f"blk.{i}.{name}"] for i in (layer, layer + 1))
                    file.seek(first.offset)
                    rows = file.read(first.n_bytes)
                    file.seek(second.offset)
                    file.write(rows)
        yield copy


def curve(run: Engine, passage: Passage, gamma: float) -> list[dict[str, Any]]:
    """Of each layer that sees all positions, beside the one before: mean cosines, and the paper's band of angles."""
    run.reset()
    run.prefill(passage.prompt)
    n, dim, spec = len(passage.prompt), run.spec.head_dim, run.spec
    layers = [i for i in range(spec.n_layers) if spec.layers[i].window is None]
    rows = {i: [kvrows.decode("f16", kept[0, :, :n], dim) for kept in run.kv.arrays[i]] for i in layers}
    found = []
    for before, layer in itertools.pairwise(layers):
        both = [angles(*pair) for pair in zip(rows[before], rows[layer], strict=True)]
        farthest = np.maximum(*both)
        least, most = farthest.min(axis=1, keepdims=True), farthest.max(axis=1, keepdims=True)
        found.append(
            {
                "layers": [before, layer],
                "keys": float(np.cos(both[0]).mean()),
                "values": float(np.cos(both[1]).mean()),
                "band": float((farthest > most - gamma * (most - least)).mean()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: minicache_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 3, 5, 7])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256, help="scored behind each prompt")
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--tie", type=int, default=0, help="pairs that share matrices")
    parser.add_argument("--retain", type=float, default=MiniCache.retain)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    config = {**vars(args), "text": Path(args.text).name, "model": Path(args.model).name}
    card(f"minicache on {args.name}", config)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(tied(Path(args.model), args.tie)) if args.tie else args.model
        checkpoint = stack.enter_context(Checkpoint(path))
        texts = passages(read_text(args.text), load_tokenizer(checkpoint), args.length, args.tokens, args.passages)
        with engine(checkpoint, HalfStore(), texts[0], args.threads) as run:
            full_bytes = run.footprint.select(kind="kv", phase="decode").bytes
            references = [reference(run, text) for text in texts]
            cosines = curve(run, texts[0], args.retain)
            n_layers = len(cosines) + 1
        for each in cosines:
            print("  layers {0[0]} and {0[1]}".format(each["layers"]), *(f"{k} {each[k]:.3f}" for k in list(each)[1:]))
        results: dict[str, dict[str, Any]] = {}
        for n_pairs in args.pairs:
            results[str(n_pairs)] = {}
            for name, kv in arms(n_layers - 2 * n_pairs, args.retain).items():
                with engine(checkpoint, kv, texts[0], args.threads) as run:
                    n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
                    along = diverge(run, texts, references)
                nll = along["reference_nll"]
                rise = along["nll"] - along["reference_nll"]
                results[str(n_pairs)][name] = {"kv_bytes": n_bytes, "nll_rise": rise, "kl": along["kl_mean"]}
                print(
                    f"  {n_pairs} pairs, {name:18} {n_bytes / full_bytes:.3f} of the bytes  NLL {rise:+.4f}  "
                    f"KL {along['kl_mean']:.4f}",
                    flush=True,
                )
        record = {
            "config": config,
            "paper": PAPER,
            "cosines": cosines,
            "full": {"kv_bytes": full_bytes, "nll": nll},
            "results": results,
            "claims": claims(results),
        }
        save(f"kv/minicache_{args.name}", record)


def claims(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The brief's gate, of NLL; and of the divergence from the full cache, which a better guess can't hide."""
    few = [arms for n_pairs, arms in results.items() if int(n_pairs) <= 3]
    found = []
    for metric, what in (("nll_rise", "rise of NLL"), ("kl", "KL")):
        for ours, other in (
            ("minicache", "plain mean"),
            ("minicache", "deeper layer only"),
            ("minicache", "without retention"),
            ("without retention", "plain mean"),
        ):
            less = float(np.mean([arms[ours][metric] - arms[other][metric] for arms in few]))
            found.append(claim(f"1 to 3 pairs: {what}, {ours} less {other}", less, at_most=0.0))
    return found


if __name__ == "__main__":
    main()
