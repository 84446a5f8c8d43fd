"""Write the dithered reference of a GGUF file: every matrix as floats with noise of half a quantization step.

    python benchmarks/quality/dithered.py IN.gguf OUT.gguf [--seed 0]

The metadata is copied as it is, so that tokenizer and shapes are the original's. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np

from barefoot.evals.dither import dither
from barefoot.io.inventory import Checkpoint

_WRITTEN_BY_THE_WRITER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


def write(source: str, target: str, seed: int = 0) -> None:
    """Write ``target``; one matrix at a time is in memory. The same seed gives the same file."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name not in _WRITTEN_BY_THE_WRITER:
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    with Checkpoint(source) as checkpoint:
        infos = list(checkpoint.tensors.values())
        for info in infos:
            writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), 4 * int(np.prod(info.shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.default_rng(seed)
        for info in infos:
            raw = np.empty(info.n_bytes, np.uint8)
            checkpoint.read_into(info.name, raw)
            n_cols = info.shape[-1]
            rows = raw.reshape(int(np.prod(info.shape[:-1])), -1)
            writer.write_tensor_data(dither(info.type, rows, n_cols, rng).reshape(info.shape))
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
