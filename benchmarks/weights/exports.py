"""Models in and out: llama.cpp predicts as barefoot does, transformers and GPTQModel mean the same weights.

    python -m benchmarks weights.exports MODEL NAME --peer PYTHON [--loaders PYTHON] [--windows 8] [--window 512]

MODEL is a GGUF file or folder. ``--peer`` is an interpreter with llama-cpp-python, ``--loaders`` one with transformers,
accelerate, compressed-tensors and gptqmodel. For each spec of weights: fit by plain rounding, export, and score the
second half of each window, in barefoot with float32 activations and in llama.cpp, whose activations are 8-bit. What
these change there is seen beside a file with the same weights in f32; what they change here, by barefoot's own int8
activations. The cheap imitation leaves the rows of q and k in the order of the folder.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from barefoot.engine.compressed_export import export_compressed
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.gguf_export import export_gguf
from barefoot.engine.repacking import repacked
from barefoot.engine.rows import Rearranged, decode, read_rows
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import spread_windows
from barefoot.evals.texts import BUILT_IN, read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.quantized import linears
from barefoot.io.safetensors import read_safetensors
from barefoot.io.tokenizer import load_tokenizer
from barefoot.io.types import TensorInfo
from barefoot.kv.stores.f32 import FloatStore
from barefoot.ops import blocks
from barefoot.plan.job import parse_weights
from barefoot.weights.solvers.range import Range
from benchmarks.harness import card, child, claim, save

GGUF_SPECS = (
    "int(bits=8,group=32,symmetric=true)",
    "embed=int(bits=8,group=32,symmetric=true) head=int attn=int(bits=4,group=64) ffn=int(bits=4,symmetric=true)",
    "embed=int(bits=8,group=32,symmetric=true) head=int attn=int(bits=4,group=64) ffn=int(bits=3,group=64)",
)
N_THREADS = 1
# One scheme for all: transformers 5.23, asked to dequantize, takes the first scheme for every layer.
COMPRESSED_SPEC = "embed=dense(dtype=f16) " + " ".join(
    f"{group}=int(bits=4,group=64,symmetric=true)" for group in ("attn", "ffn", "head")
)


def fitted(model: str | Path, folder: Path, weights: str) -> None:
    formats = parse_weights(weights)
    with Checkpoint(model) as checkpoint:
        spec = model_spec(checkpoint)
        chosen = {w.name: formats[w.group].layout(w.format) for w in spec.weights if w.group in formats}
        fit(checkpoint, spec, Fit(chosen, Range(), np.empty((0, 0), np.int32)), folder).finish({})


def exported(folder: Path, path: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        export_gguf(checkpoint, model_spec(checkpoint), path)


def losses(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Nats that each of the ids after the first half cost; ``logits`` are those of the tokens before them."""
    wanted = np.asarray(ids[len(ids) // 2 + 1 :])
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(wanted)), wanted]


def by_barefoot(folder: Path, texts: np.ndarray, activations: str) -> np.ndarray:
    config = EngineConfig(
        context=texts.shape[1], kv=FloatStore(), activations=activations, chunk=128, n_logits=16, n_threads=N_THREADS
    )
    found = []
    with Checkpoint(folder) as checkpoint, Engine(checkpoint, model_spec(checkpoint), config) as engine:
        for ids in texts.tolist():
            engine.reset()
            half = len(ids) // 2
            engine.prefill(ids[:half])
            kept: list[np.ndarray] = []
            engine.prefill(ids[half:], all_logits=lambda _, logits, kept=kept: kept.append(logits.copy()))
            found.append(losses(np.concatenate(kept)[:-1], ids))
    return np.concatenate(found)


def by_llama_cpp(python: str, path: Path, texts: np.ndarray) -> np.ndarray:
    worker = Path(__file__).parents[1] / "run" / "llama_cpp_worker.py"
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "logits.npy"
        for ids in texts.tolist():  # one window at a time: its logits may take 300 MB
            settings = {
                "model": str(path),
                "n_threads": N_THREADS,
                "context": len(ids),
                "logits_of": [ids],
                "out": str(out),
            }
            child(worker, settings, python)
            found.append(losses(np.load(out), ids))
    return np.concatenate(found)


def beside_llama_cpp(args: argparse.Namespace, folder: Path, texts: np.ndarray) -> dict[str, float]:
    """Perplexities of a fitted folder here and there, and of the same weights in f32 there."""
    dense = folder.with_suffix(".f32")
    fitted(folder, dense, "dense(dtype=f32)")
    there = {}
    for name, source in (("blocks", folder), ("f32", dense)):
        path = Path(f"{source}.gguf")
        exported(source, path)
        there[name] = by_llama_cpp(args.peer, path, texts)
        path.unlink()
    shutil.rmtree(dense)
    here, rounded = by_barefoot(folder, texts, "float32"), by_barefoot(folder, texts, "int8")
    return {
        "perplexity_float32": math.exp(here.mean()),
        "perplexity_int8": math.exp(rounded.mean()),
        "perplexity_llama_cpp": math.exp(there["blocks"].mean()),
        "perplexity_llama_cpp_f32": math.exp(there["f32"].mean()),
        "standard_error_nats": float((there["blocks"] - there["f32"]).std() / math.sqrt(len(here))),
    }


def imitation(args: argparse.Namespace, folder: Path, texts: np.ndarray) -> float:
    """llama.cpp's perplexity when the rows of q and k stay where a folder has them."""
    path = folder.with_suffix(".imitation.gguf")
    with mock.patch.object(Rearranged, "_row_order", return_value=None):
        exported(folder, path)
    found = math.exp(by_llama_cpp(args.peer, path, texts[:2]).mean())
    path.unlink()
    return found


def through_transformers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The largest difference between a weight of the folder and what transformers' loader makes of its export: as it
    is, and rounded to f16, in which the loader multiplies because the scales are f16."""
    with tempfile.TemporaryDirectory() as temporary:
        target, out = Path(temporary) / "export", Path(temporary) / "weights.safetensors"
        with Checkpoint(folder) as checkpoint:
            spec = model_spec(checkpoint)
            export_compressed(checkpoint, spec, target)
            done = child(
                Path(__file__).parent / "transformers_worker.py", {"model": str(target), "out": str(out)}, args.loaders
            )
            file, raw, off, off_f16 = read_safetensors(out), np.memmap(out, np.uint8), 0.0, 0.0
            tensors = {t.name: t for t in file.tensors}
            for weight in spec.weights:
                if weight.source in tensors:
                    t = tensors[weight.source]
                    there = raw[t.offset : t.offset + t.n_bytes].view(np.float32).reshape(t.shape)
                    here = decode(weight.format, read_rows(checkpoint, weight), weight.cols)
                    off = max(off, float(np.abs(here - there).max()))
                    off_f16 = max(off_f16, float(np.abs(here.astype(np.float16) - there).max()))
    return {"matrices": done["n"], "class": done["class"], "difference": off, "difference_in_f16": off_f16}


def through_gptqmodel(args: argparse.Namespace) -> dict[str, float]:
    """By case the largest difference between what GPTQModel and barefoot make of a file, over the largest weight."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        cases = child(Path(__file__).parent / "gptqmodel_worker.py", {"folder": temporary}, args.loaders)
        for i, (name, settings) in enumerate(cases.items()):
            path = Path(temporary) / f"{i}.safetensors"
            raw, tensors = path.read_bytes(), {t.name: t for t in read_safetensors(path).tensors}

            def read(tensor: TensorInfo, raw: bytes = raw) -> np.ndarray:
                return np.frombuffer(raw, np.uint8, tensor.n_bytes, tensor.offset)

            linear = linears({"quantization_config": settings}, tensors, read)["layer.weight"]
            parts = {part: read(tensor) for part, tensor in linear.parts.items()}
            rows = repacked(linear, parts, 0, linear.shape[0])
            meant = read(tensors["meant"]).view(np.float32).reshape(linear.shape)
            off = np.abs(blocks.decode(linear.type, rows, linear.shape[1]) - meant).max()
            found[name] = float(off / np.abs(meant).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--loaders")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()

    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer = model_spec(checkpoint), load_tokenizer(checkpoint)
    texts = spread_windows(read_text(BUILT_IN), tokenizer, args.window, args.windows)
    card(f"exports of {args.name}", {"windows": texts.shape, "specs": len(GGUF_SPECS)})
    results: dict[str, Any] = {}
    claims = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, weights in enumerate(GGUF_SPECS):
            folder = Path(temporary) / str(i)
            fitted(args.model, folder, weights)
            results[weights] = found = beside_llama_cpp(args, folder, texts)
            print(f"  {weights}: {found}", flush=True)
            exact = found["perplexity_llama_cpp_f32"] / found["perplexity_float32"]
            claims.append(claim(f"f32 in llama.cpp over barefoot, {weights}", exact, at_least=0.997, at_most=1.003))
            ratio = found["perplexity_llama_cpp"] / found["perplexity_float32"]
            claims.append(claim(f"blocks in llama.cpp over barefoot, {weights}", ratio, at_least=0.98, at_most=1.02))
        if spec.arch == "llama":
            wrong = imitation(args, folder, texts)
            results["imitation: rows of q and k not moved"] = {"perplexity_llama_cpp": wrong}
            claims.append(
                claim("perplexity of the imitation over barefoot's", wrong / found["perplexity_float32"], at_least=2)
            )
        if args.loaders:
            folder = Path(temporary) / "compressed"
            fitted(args.model, folder, COMPRESSED_SPEC)
            results["transformers"] = through_transformers(args, folder)
            off = results["transformers"]["difference_in_f16"]
            claims.append(claim("largest difference of a weight in f16 that transformers loads", off, at_most=0))
            results["gptqmodel"] = through_gptqmodel(args)
            # Two roundings to f16: theirs of the weight, ours of the minimum.
            most = max(results["gptqmodel"].values())
            claims.append(claim("largest difference of a weight from GPTQModel's", most, at_most=2**-10))
    config = {"text": BUILT_IN, "windows": len(texts), "window": args.window, "parameters": spec.n_parameters}
    save(f"weights/exports-{args.name}", {"config": config, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
