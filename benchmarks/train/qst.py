"""Quantized Side Tuning beside QLoRA and beside a side network that never sees the model's hidden states.

    python -m benchmarks train.qst MODEL --train FILE --text FILE [--steps 300] [--documents 4] [--length 512]

MODEL is an F32 file, whose layers are rounded to nf4. All three learn from the same tokens in the same order, by the
same loss (``cce``) and Adam with a rate of their own; none passes a layer again. QLoRA is LoRA of rank 16 beside all
matrices. The imitation is the same side network over other tokens' embeddings, the same ones for each token: it knows
the tokens, but nothing of what the model makes of them.

Losses are in nats a token of held-out windows; their differences are paired, and the standard error is that of the
windows' mean. Seconds of steps are hints where the machine does something else too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barefoot import ops
from barefoot.adapters.lora import LoRA
from barefoot.adapters.qst import QST
from barefoot.core.model import ModelSpec
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import text_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_weights
from barefoot.train import NOTHING, MicroBatch
from barefoot.train.driver.decoder import Decoder
from barefoot.train.driver.loop import Settings, Trainer
from barefoot.train.driver.side_decoder import SideDecoder
from barefoot.train.driver.two_caches import TwoCaches
from barefoot.train.footprint import Compute
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.schedule import Schedule
from benchmarks.harness import card, claim, save

LOSS, COMPUTE = CutCrossEntropy(), "float32"
PROMPT, GENERATED = 16, 24


class Blind(SideDecoder):
    """The imitation: what is read are other tokens' embeddings, in place of hidden states."""

    def embedded(self, batch: MicroBatch) -> torch.Tensor:
        other = (batch.ids * 7919 + 11) % self.spec.vocab_size
        self._read = super().embedded(MicroBatch(other, batch.labels, batch.lengths))
        return super().embedded(batch)

    def narrowed(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return super().narrowed(index, self._read)


class Windows:
    """So many windows to a step, in their order, over and over."""

    def __init__(self, windows: Sequence[Sequence[int]], per_step: int) -> None:
        self._windows, self._per_step, self._at = windows, per_step, 0

    def step(self) -> list[MicroBatch]:
        numbers = [(self._at + i) % len(self._windows) for i in range(self._per_step)]
        self._at += self._per_step
        return [stream([self._windows[i] for i in numbers])]

    @property
    def place(self) -> dict[str, int]:
        return {"at": self._at}


def stream(windows: Sequence[Sequence[int]]) -> MicroBatch:
    ids = np.concatenate([np.asarray(each, np.int64) for each in windows])
    lengths = tuple(len(each) for each in windows)
    labels = np.roll(ids, -1)
    labels[np.cumsum(lengths) - 1] = NOTHING
    return MicroBatch(ids, labels, lengths)


def kept_bytes(model: Decoder | SideDecoder, batch: MicroBatch) -> int:
    """What a pass saves for the backward one, besides what there was before."""
    before = [*model.buffers(), *model.adapters().values(), model.norm]
    before += [vector for layer in model._vectors for vector in layer.values()]
    known, found = {t.untyped_storage().data_ptr() for t in before}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch, LOSS)
    return sum(size for size, _ in found.values())


@torch.no_grad()
def losses(model: Decoder | SideDecoder, windows: Sequence[Sequence[int]]) -> np.ndarray:
    model.eval()
    return np.array([float(model.loss(stream([window]), LOSS)) for window in windows])


def trained(model: Decoder | SideDecoder, data: Windows, steps: int, rate: float) -> dict[str, Any]:
    schedule = Schedule("cosine", 0.03)
    settings = Settings(steps, lambda step: rate * schedule.share(step, steps), save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        seen = list(Trainer(model, LOSS, settings, "benchmark", Path(folder)).run(data))
    for step in seen[:: max(1, steps // 6)]:
        print(f"  step {step.step}: {step.loss:.4f}", flush=True)
    return {"seconds_per_step": statistics.median(step.seconds for step in seen), "rate": rate}


@torch.no_grad()
def same_tokens(model: SideDecoder, prompt: list[int]) -> int:
    """How many tokens two caches decode as passing everything again does."""
    found, ids = TwoCaches(model, len(prompt) + GENERATED).greedy(prompt, GENERATED), list(prompt)
    for _ in range(GENERATED):
        ids.append(int(model.logits(model.hidden(stream([ids]))[-1:]).argmax()))
    return sum(a == b for a, b in zip(found, ids[len(prompt) :], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--name", default="smollm2-135m-dithered")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=32, help="windows")
    parser.add_argument("--rate", type=float, default=2e-3, help="of the side networks")
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops.set_threads(args.threads)
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer = model_spec(checkpoint), load_tokenizer(checkpoint)
        n_train = args.steps * args.documents * args.length
        train = text_windows(read_text(args.train), tokenizer, args.length, n_train)
        held = text_windows(read_text(args.text), tokenizer, args.length, args.held_out * args.length)
        formats = {group: parse_weights("nf4")[group] for group in ("attn", "ffn")}
        settings = {"formats": formats, "compute": COMPUTE}
        facts = {"model": args.name, "steps": args.steps, "documents": args.documents, "length": args.length}
        facts |= {"held-out windows": len(held), "base": "nf4", "threads": args.threads}
        facts |= {"trained by qst": QST().n_trained(spec), "by lora": LoRA().n_trained(spec)}
        card("Side tuning", facts)
        arms = {
            "qlora": lambda: Decoder(checkpoint, spec, LoRA(), activations="keep", **settings),
            "qst": lambda: SideDecoder(checkpoint, spec, QST(), **settings),
            "blind": lambda: Blind(checkpoint, spec, QST(), **settings),
        }
        results, judged, extra = {}, {}, {}
        batch = stream(train[: args.documents])
        for name, build in arms.items():
            model = build()
            kept = kept_bytes(model, batch)
            if name == "qlora":
                judged["base"] = losses(model, held)
                with torch.no_grad():
                    base_logits = model.logits(model.hidden(stream(train[:1])))
            if name == "qst":
                with torch.no_grad():
                    at_first = model.logits(model.hidden(stream(train[:1])))
                extra["first difference"] = float((at_first - base_logits).abs().max())
                extra["stated"] = stated_bytes(spec, args.documents * args.length, args.length, COMPUTE)
                del at_first, base_logits
            rate = args.lora_rate if name == "qlora" else args.rate
            print(name, flush=True)
            results[name] = trained(model, Windows(train, args.documents), args.steps, rate)
            judged[name] = losses(model, held)
            results[name] |= {"kept_bytes": kept, "held_out": float(judged[name].mean())}
            print(f"  held out {results[name]['held_out']:.4f}, kept {kept:,} bytes", flush=True)
            if name == "qst":
                extra["alpha"] = float(model.adapters()["alpha"].detach())
                extra["same tokens"] = same_tokens(model, held[0][:PROMPT])
            del model
    record(args.name, facts, results, judged, extra)


def stated_bytes(spec: ModelSpec, n_tokens: int, length: int, compute: Compute) -> int:
    passing = QST().passing(spec, n_tokens, length, 4 if compute == "float32" else 2)
    return sum(term.bytes for term in (*passing.kept, *passing.head))


def error_of(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def record(name: str, facts: Any, results: Any, judged: dict[str, np.ndarray], extra: dict[str, float]) -> None:
    def gain(arm: str) -> float:
        return float((judged["base"] - judged[arm]).mean())

    better = judged["base"] - judged["qst"]
    error = error_of(better)
    over = judged["blind"] - judged["qst"]
    results["base"] = {"held_out": float(judged["base"].mean())}
    results["qst"] |= {"alpha": extra["alpha"], "stated_bytes": extra["stated"], "standard_error": error}
    kept = results["qst"]["kept_bytes"]
    ratio = kept / results["qlora"]["kept_bytes"]
    claims = [
        claim("largest difference of logits at step 0", extra["first difference"], at_most=1e-5),
        claim("bytes kept, measured / stated", kept / extra["stated"], at_least=0.95, at_most=1.05),
        claim("bytes kept, QST / QLoRA without recomputing", ratio, at_most=0.35),
        claim("gain over the frozen base, standard errors", gain("qst") / error, at_least=3),
        claim("gain over the imitation, standard errors", float(over.mean()) / error_of(over), at_least=3),
        claim("distance of alpha from 1", abs(extra["alpha"] - 1), at_least=1e-6),
        claim(f"tokens of {GENERATED} as without caches", extra["same tokens"], at_least=GENERATED),
    ]  # fmt: skip
    paper = "LLaMA-2-70B MMLU 63.9 at 56.0 GB where QLoRA has 64.1 at 95.5 GB; up to 2.3 times less memory"
    ratios = {
        "share of QLoRA's gain": gain("qst") / gain("qlora"),
        "share of QLoRA's gain, imitation": gain("blind") / gain("qlora"),
        "seconds of a step, QST / QLoRA": results["qst"]["seconds_per_step"] / results["qlora"]["seconds_per_step"],
    }
    save(
        f"train/qst_{name}",
        {"config": facts, "card": {"paper": paper}, "results": results, "ratios": ratios, "claims": claims},
        "torch",
    )


if __name__ == "__main__":
    main()
