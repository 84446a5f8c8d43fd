"""Write the dithered reference of a GGUF file: every matrix as floats with noise of half a quantization step.

    python benchmarks/quality/dithered.py IN.gguf OUT.gguf [--seed 0]

The metadata is copied as it is, so that tokenizer and shapes are the original's. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import gguf
import numpy as np

from barefoot.evals.dither import dither
from barefoot.io.inventory import Checkpoint

_WRITTEN_BY_THE_WRITER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


def write(source: str, target: str, seed: int = 0) -> None:
    """Write ``target``; one matrix at a time is in memory. The same seed gives the same file."""
    rng = np.random.default_rng(seed)
    with Checkpoint(source) as checkpoint:

        def dithered(name: str) -> np.ndarray:
            info = checkpoint.tensors[name]
            raw = np.empty(info.n_bytes, np.uint8)
            checkpoint.read_into(info.name, raw)
            rows = raw.reshape(int(np.prod(info.shape[:-1])), -1)
            return dither(info.type, rows, info.shape[-1], rng).reshape(info.shape)

        write_floats(source, target, {info.name: info.shape for info in checkpoint.tensors.values()}, dithered)


def write_floats(
    source: str, target: str, shapes: Mapping[str, tuple[int, ...]], floats: Callable[[str], np.ndarray]
) -> None:
    """Write a GGUF file of float32 tensors, ``floats(name)`` each, with the metadata of ``source``."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name not in _WRITTEN_BY_THE_WRITER:
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        writer.write_tensor_data(floats(name))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.source, args.target, args.seed)


if __name__ == "__main__":
    main()
