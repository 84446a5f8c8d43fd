"""Write a GGUF file of a Llama shape with random weights, for measuring bytes and speed (never quality).

    python benchmarks/models/random_llama.py OUT.gguf [--shape tinyllama-1.1b] [--type q4_0] [--seed 0]

Weights are drawn block by block as bytes: codes uniform, scales such that a matrix has a spectral norm near 1, so that
activations neither vanish nor overflow over the layers. Written tensor by tensor; no more than one is in memory.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np

SHAPES = {
    "tinyllama-1.1b": {
        "layers": 22,
        "d": 2048,
        "heads": 32,
        "kv_heads": 4,
        "ffn": 5632,
        "vocab": 32_000,
        "context": 32_768,
    },
    "smollm2-135m": {
        "layers": 30,
        "d": 576,
        "heads": 9,
        "kv_heads": 3,
        "ffn": 1536,
        "vocab": 49_152,
        "context": 32_768,
    },
    "tiny": {"layers": 2, "d": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512, "context": 256},
}
TYPES = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "f16": gguf.GGMLQuantizationType.F16,
}
_CODE_STD = {"q4_0": 4.6, "q8_0": 74.0}


def matrix(rng: np.random.Generator, rows: int, cols: int, kind: str) -> np.ndarray:
    """Random weights of standard deviation 1/√cols, as the type's bytes (rows, row_bytes), or f16 (rows, cols)."""
    std = cols**-0.5
    if kind == "f16":
        return (rng.standard_normal((rows, cols), np.float32) * std).astype(np.float16)
    block = {"q4_0": 18, "q8_0": 34}[kind]
    blocks = rng.integers(0, 256, (rows, cols // 32, block), np.uint8)
    blocks[..., :2] = np.full(1, std / _CODE_STD[kind], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def vocabulary(n: int) -> tuple[list[str], list[int]]:
    """A byte-level vocabulary with one merge: an end token, 256 bytes in GPT-2's alphabet, "ab", and unused entries."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    alphabet = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    tokens = ["<|end|>", *alphabet, "ab", *(f"<unused{i}>" for i in range(n - 258))]
    return tokens[:n], [3] + [1] * 257 + [5] * (n - 258)


def write(path: str, shape: dict[str, int], kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, head = shape["d"], shape["d"] // shape["heads"]
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_name(f"random {kind}")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(d)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(shape["vocab"])
    tokens, types = vocabulary(shape["vocab"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)

    kv = shape["kv_heads"] * head
    names: list[tuple[str, int, int]] = [("token_embd", shape["vocab"], d)]
    for i in range(shape["layers"]):
        names += [(f"blk.{i}.attn_q", d, d), (f"blk.{i}.attn_k", kv, d), (f"blk.{i}.attn_v", kv, d)]
        names += [(f"blk.{i}.attn_output", d, d), (f"blk.{i}.ffn_gate", shape["ffn"], d)]
        names += [(f"blk.{i}.ffn_up", shape["ffn"], d), (f"blk.{i}.ffn_down", d, shape["ffn"])]
        names += [(f"blk.{i}.attn_norm", 0, d), (f"blk.{i}.ffn_norm", 0, d)]
    names += [("output_norm", 0, d), ("output", shape["vocab"], d)]
    sizes = {"q4_0": (18, 32), "q8_0": (34, 32), "f16": (2, 1)}[kind]
    for name, rows, cols in names:
        if rows == 0:
            writer.add_tensor_info(f"{name}.weight", (cols,), np.dtype(np.float32), cols * 4)
        elif kind == "f16":
            writer.add_tensor_info(f"{name}.weight", (rows, cols), np.dtype(np.float16), rows * cols * 2)
        else:
            row_bytes = cols // sizes[1] * sizes[0]
            writer.add_tensor_info(
                f"{name}.weight", (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, TYPES[kind]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, rows, cols in names:
        writer.write_tensor_data(np.ones(cols, np.float32) if rows == 0 else matrix(rng, rows, cols, kind))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, SHAPES[args.shape], args.type, args.seed)


if __name__ == "__main__":
    main()
