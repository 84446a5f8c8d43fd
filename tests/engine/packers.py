"""Checkpoints as other programs lay them out, packed code by code with Python's whole numbers."""

from __future__ import annotations

import json

import numpy as np

from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, write_safetensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in 32-bit words, low bits first."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


def by_columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) codes: the n of each column in words, (n × bits / 32, m)."""
    return np.array([words(column, bits) for column in codes.T.tolist()], np.uint32).T.view(np.int32)


def by_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.array([words(row, bits) for row in codes.tolist()], np.uint32).view(np.int32)


def gptq(codes, scales, zeros, bits, *, less=1, g_idx=None) -> dict[str, np.ndarray]:
    """``codes`` (rows, cols), ``scales`` and ``zeros`` (rows, groups)."""
    found = {
        "qweight": by_columns(codes.T, bits),
        "scales": scales.T.astype(np.float16),
        "qzeros": by_rows(zeros.T - less, bits),
    }
    return found if g_idx is None else found | {"g_idx": g_idx.astype(np.int32)}


def awq(codes, scales, zeros) -> dict[str, np.ndarray]:
    def ordered(values):  # (n, rows): bits 4 i of a word are row ORDER[i] of eight
        eights = values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)]
        return by_rows(eights.reshape(len(values), -1), 4)

    return {"qweight": ordered(codes.T), "scales": scales.T.astype(np.float16), "qzeros": ordered(zeros.T)}


def compressed(codes, scales, zeros, bits, *, symmetric=False) -> dict[str, np.ndarray]:
    found = {
        "weight_packed": by_rows(codes, bits),
        "weight_scale": scales.astype(np.float32),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    return found if symmetric else found | {"weight_zero_point": by_columns(zeros, bits)}


def repack(source, folder, settings, pack, *, bits, group, symmetric=False, scatter=False) -> dict[str, np.ndarray]:
    """Write the folder ``source`` anew with random codes in its layers' matrices; what they mean, float64, by name."""
    rng = np.random.default_rng(11)
    means, entries = {}, []
    with Checkpoint(source) as checkpoint:
        for name, info in checkpoint.tensors.items():
            raw = np.empty(info.n_bytes, np.uint8)
            checkpoint.read_into(name, raw)
            if "proj" not in name or name.endswith("bias"):
                entries.append(array_entry(name, raw.view(np.float32).reshape(info.shape)))
                continue
            rows, cols = info.shape
            size = cols if group == -1 else group
            columns = np.arange(cols) // size
            codes = rng.integers(0, 1 << bits, (rows, cols))
            step = cols**-0.5 / (1 << bits) * 2
            scales = (step * rng.uniform(0.5, 2, (rows, cols // size))).astype(np.float16).astype(np.float64)
            zeros = rng.integers(1, 1 << bits, scales.shape)
            if symmetric:
                zeros[:] = 1 << (bits - 1)
            more = {}
            if scatter:
                columns = rng.permutation(columns)
                more["g_idx"] = columns
            means[name] = scales[:, columns] * (codes - zeros[:, columns])
            parts = pack(codes, scales, zeros, **more)
            entries += [array_entry(f"{name.removesuffix('.weight')}.{key}", each) for key, each in parts.items()]
        config = {**checkpoint.config, "quantization_config": settings}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", entries)
    return means
