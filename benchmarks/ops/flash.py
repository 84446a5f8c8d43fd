"""Attention that trains: error, bytes kept and time, against PyTorch's own attention and attention that is written out.

python -m benchmarks ops.flash [--times] [--threads 2]

Contenders, all float32, of the same queries, keys and values, causal, in one process:

* ours: ``train.driver.attention.attend``;
* torch: ``scaled_dot_product_attention`` with its own choice of kernel, keys and values repeated for the heads that
  share them (its kernel for CPUs takes no groups);
* written out: scores, softmax and product by autograd;
* tiles: the imitation, a running softmax over the same tiles as ours whose steps autograd keeps.

Errors are taken from float64, largest of all numbers. Bytes are the distinct storages that autograd keeps for the
backward pass, for one length and twice as much: linear, where what is written out grows with the square. With
``--times``: forward and backward at N = 4,096, two threads against one where there is a single head (a kernel that
shares out heads would gain nothing), and twice the length with the window kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from barefoot import ops
from barefoot.core.measure import storage_bytes
from barefoot.train.attention import AttentionShape
from barefoot.train.driver.attention import attend
from benchmarks.harness import card, claim, rounds, save

SHAPE = (9, 3, 64)  # heads, key heads and head_dim of SmolLM2-135M
SHAPES = {"smollm2": SHAPE, "gemma3": (4, 1, 256), "80": (4, 4, 80)}
TILE = 64

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(n: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of what they give."""
    n_heads, n_kv_heads, head_dim = shape
    torch.manual_seed(0)
    *given, d_out = (torch.randn(n, heads, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads, n_heads))
    return [x.to(dtype).requires_grad_() for x in given], d_out.to(dtype)


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sharing = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(sharing, dim=1) for x in (k, v))
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def ours(window: int = 0) -> Attention:
    return lambda q, k, v: attend(q, k, v, (len(q),), scale=q.shape[2] ** -0.5, window=window)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (x[None] for x in by_heads(q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = by_heads(q, k, v)
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def by_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = by_heads(q, k, v)
    outs = []
    for first in range(0, q.shape[1], TILE):
        own = q[:, first : first + TILE] * q.shape[2] ** -0.5
        top = torch.full((*own.shape[:2], 1), -torch.inf, dtype=q.dtype)
        total, sums = torch.zeros_like(top), torch.zeros_like(own)
        for base in range(0, first + TILE, TILE):
            scores = own @ k[:, base : base + TILE].transpose(1, 2)
            if base == first:
                scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            highest = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, keep = torch.exp(scores - highest), torch.exp(top - highest)
            total, sums = total * keep + weights.sum(-1, keepdim=True), sums * keep + weights @ v[:, base : base + TILE]
            top = highest
        outs.append(sums / total)
    return torch.cat(outs, 1).transpose(0, 1)


CONTENDERS: dict[str, Attention] = {
    "ours": ours(),
    "torch": by_torch,
    "written out": written_out,
    "tiles": by_tiles,
}


def errors(attention: Attention, n: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """The largest error of outputs and of gradients."""
    found = []
    for each, dtype in ((attention, torch.float32), (written_out, torch.float64)):
        given, d_out = inputs(n, shape, dtype)
        out = each(*given)
        found.append((out.detach(), *torch.autograd.grad(out, given, d_out)))
    return {
        name: float((got - exact).abs().max())
        for name, got, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True)
    }


def kept_bytes(attention: Attention, n: int, shape: tuple[int, int, int]) -> int:
    kept: list[Tensor] = []
    given, _ = inputs(n, shape)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(*given)
    assert out.requires_grad
    return storage_bytes(kept)


def timed(attention: Attention, n: int, shape: tuple[int, int, int], n_threads: int) -> Callable[[], dict[str, float]]:
    given, d_out = inputs(n, shape)

    def measure() -> dict[str, float]:
        ops.set_threads(n_threads)
        torch.set_num_threads(n_threads)
        start = time.perf_counter()
        out = attention(*given)
        middle = time.perf_counter()
        torch.autograd.grad(out, given, d_out)
        end = time.perf_counter()
        return {"forward_s": middle - start, "backward_s": end - middle, "both_s": end - start}

    return measure


def times(n_threads: int) -> tuple[dict[str, Any], dict[str, float], list[dict[str, Any]]]:
    alone = (1, 1, 64)
    contenders = {
        **{name: timed(CONTENDERS[name], 4096, SHAPE, n_threads) for name in ("ours", "torch", "written out")},
        "one head, 1 thread": timed(ours(), 8192, alone, 1),
        "one head, 2 threads": timed(ours(), 8192, alone, 2),
        "window 512, 4096": timed(ours(512), 4096, SHAPE, n_threads),
        "window 512, 8192": timed(ours(512), 8192, SHAPE, n_threads),
    }
    found = rounds(contenders, 7)
    median = {name: {metric: each["median"] for metric, each in of.items()} for name, of in found.items()}
    ratios = {
        f"{metric[:-2]}, ours / {peer}": median["ours"][metric] / median[peer][metric]
        for peer in ("torch", "written out")
        for metric in ("forward_s", "backward_s", "both_s")
    }
    threads = median["one head, 2 threads"]["both_s"] / median["one head, 1 thread"]["both_s"]
    window = median["window 512, 8192"]["both_s"] / median["window 512, 4096"]["both_s"]
    claims = [
        claim("forward at N=4,096 / torch's own", ratios["forward, ours / torch"], at_most=1.0),
        claim("forward and backward / torch's own", ratios["both, ours / torch"], at_most=1.0),
        claim("forward and backward / written out", ratios["both, ours / written out"], at_most=1.0),
        claim("2 threads / 1 thread, one head of 8,192 tokens", threads, at_most=0.65),
        claim("window of 512: 8,192 tokens / 4,096", window, at_most=2.3),
    ]
    return found, {**ratios, "2 threads / 1": threads, "window, 8,192 / 4,096": window}, claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="on a machine that does nothing else")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    n = 1024
    stated = {name: AttentionShape(*shape, (n,)).saved_terms() for name, shape in SHAPES.items()}
    facts: dict[str, Any] = {"instruction set": ops.isa(), "threads": args.threads, "tokens": n}
    for name, terms in stated.items():
        facts[f"{name} {SHAPES[name]}"] = f"{sum(term.bytes for term in terms):,} bytes kept"
    card("Attention that trains", facts)
    ops.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    claims = []
    for name, shape in SHAPES.items():
        results[name] = of = {
            who: errors(each, n, shape)
            | {"kept_bytes": kept_bytes(each, n, shape), "kept_bytes_of_twice": kept_bytes(each, 2 * n, shape)}
            for who, each in CONTENDERS.items()
        }
        for who, found in of.items():
            print(
                f"  {name:<8} {who:<12} " + "  ".join(f"{key} {value:,.3g}" for key, value in found.items()), flush=True
            )
        worst = max(of["ours"][key] / of["written out"][key] for key in ("out", "dq", "dk", "dv"))
        kept, right = of["ours"]["kept_bytes"], sum(term.bytes for term in stated[name])
        growth = {who: found["kept_bytes_of_twice"] / found["kept_bytes"] for who, found in of.items()}
        ratios |= {f"{name}: bytes kept, ours / {who}": kept / found["kept_bytes"] for who, found in of.items()}
        ratios |= {f"{name}: bytes kept of twice the tokens / of {n}, {who}": each for who, each in growth.items()}
        claims += [
            claim(f"{name}: error / that of float32 written out, at worst", worst, at_most=2.0),
            claim(f"{name}: bytes kept / stated", kept / right, at_least=1.0, at_most=1.0),
            claim(f"{name}: bytes kept of twice the tokens", growth["ours"], at_least=2.0, at_most=2.0),
            claim(f"{name}: of twice the tokens, by the imitation", growth["tiles"], at_least=2.5),
        ]
    if args.times:
        results["times"], more, of_times = times(args.threads)
        ratios, claims = ratios | more, claims + of_times
    config = {"n": n, "shapes": SHAPES, "threads": args.threads, "isa": ops.isa(), "times": args.times}
    save(
        "ops_flash", {"config": config, "card": facts, "results": results, "ratios": ratios, "claims": claims}, "torch"
    )


if __name__ == "__main__":
    main()
