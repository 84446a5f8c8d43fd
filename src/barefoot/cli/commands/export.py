"""``barefoot export``: write a model for other programs, weights bit for bit the same."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from barefoot.cli import arguments, console, models, progress
from barefoot.core.units import format_bytes

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.io.inventory import Checkpoint

HELP = "write a model for other programs, its weights bit for bit the same"
EXAMPLES = (
    "barefoot export fitted/ -o model.gguf",
    "barefoot export fitted/ -o deployed/ --to compressed-tensors",
    "barefoot export gptq-checkpoint/ -o folder/ --to barefoot --json export.json",
    "barefoot export llama/ --adapter tuned/ -o merged/ --to barefoot",
)
JSON_KEYS = {
    "model": "what was exported",
    "path": "the file or folder that was written",
    "to": "its kind",
    "formats": "format → number of tensors that have it now",
    "merged": "with --adapter: matrices that it is in, those that it stands beside, and the most that rounding lost of "
    "what it adds to any; else null",
    "bytes": "of what was written",
    "peak_bytes": "the process's high-water mark",
    "seconds": "of writing",
}
KINDS = {
    "gguf": "one file that llama.cpp runs",
    "compressed-tensors": "a folder that transformers and vLLM load",
    "barefoot": "a folder that barefoot runs and fits",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument("-o", "--output", metavar="PATH", required=True, help="the file or folder to write")
    arguments.add_adapter(
        parser,
        "a folder of PEFT (LoRA) that becomes part of the model: in matrices of a dense type as "
        "a sum, rounded, beside packed ones as it is; --to barefoot",
    )
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    parser.add_argument("--to", choices=tuple(KINDS), default="gguf", help=f"default gguf ({meanings})")


def execute(args: argparse.Namespace) -> int:
    from barefoot.core.measure import peak_resident
    from barefoot.engine.specs import model_spec
    from barefoot.io.inventory import Checkpoint

    path = Path(args.output)
    started = time.perf_counter()
    merged: Mapping[str, float | int] | None = None
    with Checkpoint(models.fetch(args.model)) as checkpoint, progress.line() as report:
        spec = model_spec(checkpoint)
        if args.adapter is None:
            formats = _write(checkpoint, spec, path, args.to, report)
        else:
            formats, merged = _merge(checkpoint, spec, args.adapter, path, args.to, report)
    n_bytes = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    result = {
        "model": args.model,
        "path": str(path),
        "to": args.to,
        "formats": dict(Counter(formats.values())),
        "merged": merged,
        "bytes": n_bytes,
        "peak_bytes": peak_resident(),
        "seconds": time.perf_counter() - started,
    }
    if args.json:
        console.write_json(result, args.json)
    if args.json != console.STDOUT:
        print(f"{path}  {format_bytes(n_bytes)}")
        print(console.table([(name, f"{n:,} tensors") for name, n in Counter(formats.values()).items()], right=(1,)))
        if merged is not None:
            print(
                f"adapter in {merged['into']} matrices, beside {merged['beside']}; rounding lost up to "
                f"{merged['lost']:.2%} of what it adds to one"
            )
    return 0


def _merge(
    checkpoint: Checkpoint, spec: ModelSpec, adapter: str, path: Path, kind: str, report: progress.Report
) -> tuple[dict[str, str], Mapping[str, float | int]]:
    """Write the model with the adapter in it, and return matrix → format, and what became of the adapter."""
    from barefoot.adapters.files import read_adapter
    from barefoot.core.errors import InvalidInput
    from barefoot.engine.merging import merge, summary

    if kind != "barefoot" or path.is_file():
        raise InvalidInput(
            f"an adapter is merged into a folder of barefoot's, not --to {kind}"
            if kind != "barefoot"
            else f"{path} must be a folder for --to barefoot",
            cure="barefoot export MODEL --adapter DIR --to barefoot -o FOLDER; if its matrices are dense, export it on",
        )
    merged = merge(checkpoint, spec, read_adapter(adapter), path, report)
    return merged.formats, summary(merged)


def _write(checkpoint: Checkpoint, spec: ModelSpec, path: Path, kind: str, report: progress.Report) -> dict[str, str]:
    """Write it, and return tensor → format."""
    from barefoot.core.errors import InvalidInput

    if path.is_dir() if kind == "gguf" else path.is_file():
        raise InvalidInput(f"{path} must be a {'file' if kind == 'gguf' else 'folder'} for --to {kind}")
    if kind == "gguf":
        from barefoot.engine.gguf_export import export_gguf

        return export_gguf(checkpoint, spec, path, report)
    if kind == "compressed-tensors":
        from barefoot.engine.compressed_export import export_compressed

        return export_compressed(checkpoint, spec, path, report)
    import numpy as np

    from barefoot.engine.fitting import Fit, fit
    from barefoot.weights.solvers.range import Range

    fit(checkpoint, spec, Fit({}, Range(), np.empty((0, 0), np.int32)), path, report).finish({"exported": spec.name})
    return {weight.source: weight.format for weight in spec.weights}
