"""Commands to paste: the one place that spells the command line's flags for a job and what is stated about it."""

from __future__ import annotations

import shlex

from barefoot.core.units import exact_bytes, flag_bytes
from barefoot.ops.dispatch import format_layouts
from barefoot.plan.job import RunJob, Stated, format_weights


def command(model: str, device: str, job: RunJob, budget_bytes: int, stated: Stated, *, exact: bool = False) -> str:
    """The command for ``job`` within ``budget_bytes`` of the place that computes, with what is stated as flags.

    ``barefoot run`` on this machine (of a batch: the prompts are the lines of standard input), ``barefoot plan`` for
    another one. ``exact`` never rounds the budget up.
    """
    words = ["barefoot", "run" if device == "this" else "plan", model]
    words += ["--device", device] if device != "this" else []
    words += ["--memory", exact_bytes(budget_bytes) if exact else flag_bytes(budget_bytes)]
    words += ["--context", str(job.context), "--max-tokens", str(job.max_tokens)]
    words += ["--batch", str(job.batch)] if job.batch > 1 else []
    words += ["--adapter", job.adapter.path] if job.adapter is not None else []
    words += ["--weights", format_weights(stated.weights)] if stated.weights else []
    words += ["--kv", str(stated.kv)] if stated.kv else []
    words += ["--chunk", str(stated.chunk)] if stated.chunk is not None else []
    words += ["--stream-layers", str(stated.streamed_layers)] if stated.streamed_layers is not None else []
    if stated.stream_head is not None:
        words.append("--stream-head" if stated.stream_head else "--no-stream-head")
    words += ["--threads", str(stated.n_threads)] if stated.n_threads is not None else []
    words += ["--activations", stated.activations] if stated.activations is not None else []
    words += ["--layouts", format_layouts(stated.layouts)] if stated.layouts is not None else []
    words += ["--stacked", str(stated.n_stacked)] if stated.n_stacked is not None else []
    return shlex.join(words)
