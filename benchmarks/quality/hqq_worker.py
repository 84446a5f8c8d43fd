"""Quantize a folder of floats with HQQ's own package: one fresh process of the peer. Argument: JSON.

{"source", "to", "bits", "group", "embed_bits"}: every matrix is rounded along its inputs and written back as the floats
that its codes mean; bytes are those of codes, and of a scale and a zero in f16 for each group.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file


def quantized(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, int]:
    """What is stored, and its bytes."""
    codes, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        channel_wise=True,
        group_size=group,
        optimize=True,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    back = Quantizer.dequantize(codes, meta).reshape(weight.shape).float()
    return back, weight.numel() * bits // 8 + weight.numel() // group * 4


def main() -> None:
    settings = json.loads(sys.argv[1])
    source, target = Path(settings["source"]), Path(settings["to"])
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    n_bytes = 0
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                outer = "embed_tokens" in name or "lm_head" in name
                tensors[name], size = quantized(tensor, settings["embed_bits" if outer else "bits"], settings["group"])
                n_bytes += size
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / path.name)
    print(json.dumps({"n_bytes": n_bytes}))


if __name__ == "__main__":
    main()
