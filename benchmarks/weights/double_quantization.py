"""NF4 with double quantization: what it loses on normal weights and on a model's, beside other types of four bits.

    python -m benchmarks weights.double_quantization FILE.safetensors [--name minilm]

Errors are root mean squares over those of the weights, in blocks of 64 with float32 scales where nothing else is said.
FP4 of bitsandbytes lacks the subnormal numbers of two bits of exponent and one of mantissa. Imitation: scales as signed
bytes of their largest, without the mean. Where bitsandbytes is installed, codes and scales are compared with its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from barefoot.engine.rows import decode as decode_rows
from barefoot.io.files import BinaryFile
from barefoot.io.safetensors import read_safetensors
from barefoot.weights import double_quantization as double
from benchmarks.harness import card, claim, save

GROUP = 64
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
BITSANDBYTES_FP4 = (0, 0.03125, 1, 1.5, 2, 3, 4, 6)
NORMAL = {"nf4": 0.092, "int4, 15 levels": 0.108, "fp4 of bitsandbytes": 0.122}  # expected on normal weights


def rounded(weights: np.ndarray, magnitudes: tuple[float, ...]) -> np.ndarray:
    """To the nearest level of blocks (n, 64), scales in float32."""
    levels = np.unique([*magnitudes, *(-m for m in magnitudes)]).astype(np.float32) / max(magnitudes)
    return with_levels(weights, levels)


def with_levels(weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    scales = np.abs(weights).max(axis=1, keepdims=True)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, weights / np.where(scales > 0, scales, 1))
    return levels[codes] * scales


def imitation(weights: np.ndarray) -> np.ndarray:
    scales = np.abs(weights).max(axis=1)
    units = np.repeat(np.maximum.reduceat(scales, np.arange(0, len(scales), double.SECOND)) / 127, double.SECOND)
    units = units[: len(scales)]
    near = np.round(scales / units) * units
    return with_levels(weights, double.levels()) * (near / np.where(scales > 0, scales, 1))[:, None]


def errors(weights: np.ndarray) -> dict[str, float]:
    blocks = weights.reshape(-1)[: weights.size // GROUP * GROUP].reshape(-1, GROUP)
    stored = double.encode([blocks], blocks.size, GROUP)
    found = {
        "nf4, double": double.decode(stored, blocks.size, GROUP, 0, blocks.size).reshape(blocks.shape),
        "nf4, scales as bytes": imitation(blocks),
        "nf4": with_levels(blocks, double.levels()),
        "int4, 15 levels": rounded(blocks, tuple(range(8))),
        "fp4": rounded(blocks, FP4),
        "fp4 of bitsandbytes": rounded(blocks, BITSANDBYTES_FP4),
    }
    size = float(np.square(blocks, dtype=np.float64).sum())
    return {k: float(np.sqrt(np.square(v - blocks, dtype=np.float64).sum() / size)) for k, v in found.items()}


def beside_bitsandbytes(weights: np.ndarray) -> dict[str, float] | None:
    """Shares of codes, and of codes of scales, that differ; None where it isn't installed."""
    try:
        import torch
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None
    codes, state = quantize_4bit(torch.from_numpy(weights), blocksize=GROUP, compress_statistics=True, quant_type="nf4")
    stored = double.encode([weights], weights.size, GROUP)
    of_scales, n_blocks, n_codes = double.sizes(weights.size, GROUP)
    scales = stored[4 + 4 * of_scales :][:n_blocks]
    return {
        "codes": float((stored[-n_codes:] != codes.numpy().reshape(-1)).mean()),
        "scales": float((scales != state.absmax.numpy()).mean()),
    }


def matrices(path: str) -> Mapping[str, np.ndarray]:
    file, found = read_safetensors(path), {}
    with BinaryFile(path) as data:
        for tensor in file.tensors:
            if len(tensor.shape) == 2 and "layer." in tensor.name:
                rows = np.frombuffer(data.read_at(tensor.offset, tensor.n_bytes), np.uint8)
                found[tensor.name] = decode_rows(tensor.type, rows.reshape(tensor.shape[0], -1), tensor.shape[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--name", default="minilm")
    args = parser.parse_args()
    normal = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    real = matrices(args.file)
    card("weights.double_quantization", {"matrices": len(real), "weights": sum(w.size for w in real.values())})
    each = [errors(w) for w in real.values()]
    results: dict[str, Any] = {
        "normal": errors(normal),
        args.name: {kind: float(np.mean([found[kind] for found in each])) for kind in each[0]},
    }
    for where, found in results.items():
        print(where, {kind: round(error, 4) for kind, error in found.items()}, flush=True)
    seen, of_model = results["normal"], results[args.name]
    claims = [
        claim(f"error on normal weights, {kind}", seen[kind], at_least=0.98 * value, at_most=1.02 * value)
        for kind, value in NORMAL.items()
    ]
    for where, found in results.items():
        more = found["nf4, double"] / found["nf4"] - 1
        claims.append(claim(f"more error by double quantization, {where}", more, at_most=0.01))
    order = ("nf4", "int4, 15 levels", "fp4 of bitsandbytes")
    for better, worse in itertools.pairwise(order):
        claims.append(
            claim(f"error of {better} over {worse}'s, {args.name}", of_model[better] / of_model[worse], at_most=1.0)
        )
    peer = beside_bitsandbytes(normal)
    if peer is not None:
        claims.append(claim("codes that differ from bitsandbytes'", peer["codes"], at_most=0.0))
        claims.append(claim("codes of scales that differ by a rounding", peer["scales"], at_most=0.01))
    paper = "quantile levels lose less than FP4 and integers on normal weights; scales of scales lose next to nothing"
    save(
        f"weights/double_quantization_{args.name}",
        {"config": {"group": GROUP}, "card": {"paper": paper, "bits": 8 * double.n_bytes(1 << 20, 64) / (1 << 20)},
         "results": results, "ratios": {"bitsandbytes": peer}, "claims": claims},
        "bitsandbytes",
    )  # fmt: skip


if __name__ == "__main__":
    main()
