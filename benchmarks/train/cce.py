"""Cut cross-entropy beside plain cross-entropy, on hidden states of real text: bytes, seconds, errors, the filter.

    python -m benchmarks train.cce MODEL NAME --text FILE [--tokens 2048] [--rounds 3] [--threads 1]

Every contender runs in a fresh process, with the hidden states and the head (or its stored rows) in memory before it is
measured: what is reported is the peak on top of that, gradients among it, and the seconds of loss and gradient. Beside
plain cross-entropy runs a cheap imitation, all words of a few tokens at a time (as Liger-Kernel does it). Gradients are
compared with float64, those of the head at the labels and at every 64th word. What the filter of 2**-12 leaves out is
counted on tiles of the paper's size, with the vocabulary in order and sorted. With --rounds 0 nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from barefoot.engine.exact import last_states
from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import text_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.train.driver import logit_tiles
from barefoot.train.losses import LossShape, total
from benchmarks.harness import card, child, claim, rounds, save
from benchmarks.train.contenders import LOSSES, PAPERS, computed, loaded

WINDOW = 513  # tokens, of which the last is only foreseen
EVERY = 64
EPSILON = PAPERS["filter"]
#: of each kind of head
TIMED = {
    "frozen": ("plain", "by rows", "cce"),
    "packed": ("cce",),
    "trained": ("plain", "by rows", "cce", "cce filtered", "cce filtered, small tiles"),
}
BESIDE = {"frozen": "frozen", "packed": "frozen", "trained": "trained"}  # of plain cross-entropy
COMPARED = ("plain", "by rows", "cce", "cce filtered, small tiles", "cce filtered, small tiles, whole head")


def prepare(model: str, text: str, n_tokens: int, folder: Path) -> dict[str, Any]:
    """Write what contenders load: normed hidden states of the text, the tokens behind them, the head."""
    with Checkpoint(model) as checkpoint:
        tokenizer, spec = load_tokenizer(checkpoint), model_spec(checkpoint)
        assert not spec.logit_softcap
        source = Source(checkpoint, spec)
        n_windows = -(-n_tokens // (WINDOW - 1))
        ids = np.array(text_windows(read_text(text), tokenizer, WINDOW, WINDOW * n_windows), np.int32)
        states = np.concatenate([*last_states(source, spec, np.ascontiguousarray(ids[:, :-1]))])[:n_tokens]
        name = "embed" if spec.tied else "head"
        np.save(folder / "hidden.npy", states)
        np.save(folder / "labels.npy", ids[:, 1:].reshape(-1)[:n_tokens].astype(np.int64))
        np.save(folder / "head.npy", source.floats(name))
        np.save(folder / "packed.npy", source.stored(name))
        (folder / "format.json").write_text(json.dumps(source.weights[name].format))
        return {"format": source.weights[name].format, "tokens": len(states), "d_model": spec.d_model}


def exact(hidden: Tensor, head: Tensor, labels: Tensor, words: Tensor) -> tuple[float, Tensor, Tensor, float]:
    """In float64: the mean loss, its gradients by hidden states and some words of the head, and which share of all
    |p - 1[v = x]| reaches the filter."""
    n, loss, above = len(hidden), 0.0, 0
    head64, by_hidden = head.double(), torch.empty(hidden.shape, dtype=torch.float64)
    by_words = torch.zeros(len(words), hidden.shape[1], dtype=torch.float64)
    for start in range(0, n, 64):
        some = slice(start, start + 64)
        x, rows = hidden[some].double(), torch.arange(len(labels[some]))
        errors = torch.log_softmax(x @ head64.T, 1)
        loss -= float(errors[rows, labels[some]].sum())
        errors.exp_()[rows, labels[some]] -= 1
        above += int((errors.abs() >= EPSILON).sum())
        by_hidden[some] = errors @ head64 / n
        by_words += errors[:, words].T @ x / n
    return loss / n, by_hidden, by_words, above / (n * len(head))


def apart(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference).norm() / reference.norm())


def compared(folder: Path) -> dict[str, dict[str, float]]:
    """Errors of each loss with a trained head, and of the frozen one's, against float64."""
    hidden, head, labels = loaded(folder, "frozen")
    words = torch.unique(torch.cat([labels, torch.arange(0, len(head), EVERY)]))
    loss, by_hidden, by_words, above = exact(hidden.detach(), head, labels, words)
    found = {"text": {"loss": loss, "share at or above the filter": above}}
    for kind, names in {"trained": COMPARED, "frozen": ("cce",)}.items():
        for name in names:
            hidden.grad = head.grad = None
            head.requires_grad_(kind == "trained")
            ours = computed(name, hidden, head, labels)
            assert hidden.grad is not None
            cosine = torch.cosine_similarity(hidden.grad.double().flatten(), by_hidden.flatten(), dim=0)
            one = {"loss": abs(ours - loss) / loss, "hidden": apart(hidden.grad, by_hidden), "cosine": float(cosine)}
            if kind == "trained":
                one["head"] = apart(head.grad[words], by_words)
            found[f"{name}, {kind}"] = one
            print(f"  {name}, {kind}: {one}", flush=True)
    return found


def left_out(folder: Path, name: str) -> float:
    """The share of tiles that the filter leaves out."""
    hidden, head, labels = loaded(folder, "trained")
    matter, counted = logit_tiles.matters, []
    with mock.patch.object(logit_tiles, "matters", lambda *args: counted.append(matter(*args)) or counted[-1]):
        computed(name, hidden, head, labels)
    return 1 - sum(counted) / len(counted)


def predicted(name: str, kind: str, n: int, vocab: int, d: int) -> float:
    """MiB at the peak of both passes."""
    shape = LossShape(n, n, d, vocab, head_bytes=0 if kind == "packed" else 4, trains_head=kind == "trained")
    loss = LOSSES[name]
    behind = total(loss.saved_terms(shape)) + total(loss.backward_terms(shape))
    return max(total(loss.forward_terms(shape)), behind) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 measures bytes once")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        facts = prepare(args.model, args.text, args.tokens, folder)
        vocab = len(np.load(folder / "head.npy", mmap_mode="r"))
        n, d = facts["tokens"], facts["d_model"]
        card(f"cut cross-entropy on {args.name}", facts | {"vocabulary": vocab, "one array of logits": 4 * n * vocab})

        def contender(name: str, kind: str) -> Any:
            settings = {"loss": name, "folder": temporary, "head": kind, "threads": args.threads}
            return lambda: child(Path(__file__).with_name("contenders.py"), settings)

        contenders = {f"{name}, {kind}": contender(name, kind) for kind, names in TIMED.items() for name in names}
        measured = rounds(contenders, max(1, args.rounds), warmup=1 if args.rounds else 0)
        for kind, names in TIMED.items():
            for name in names:
                of_one = measured[f"{name}, {kind}"]
                if name in LOSSES:
                    of_one["predicted_mib"] = round(predicted(name, kind, n, vocab, d), 3)
                if not args.rounds:
                    del of_one["seconds"], of_one["processor_seconds"]
        errors = compared(folder)
        shares = {
            name: left_out(folder, name)
            for name in ("cce filtered", "cce filtered, small tiles", "cce filtered, small tiles, unsorted")
        }

    def ratio(ours: str, other: str, metric: str) -> float:
        return measured[ours][metric]["median"] / measured[other][metric]["median"]

    metrics = ("extra_mib", "processor_seconds") if args.rounds else ("extra_mib",)
    ratios = {
        f"{kind}: {metric}, {name} / plain": ratio(f"{name}, {kind}", f"plain, {BESIDE[kind]}", metric)
        for kind, names in TIMED.items()
        for name in names
        for metric in metrics
        if name != "plain"
    }
    small = "cce filtered, small tiles"
    millionths = {
        f"{name}, {what}": 1e6 * errors[name][what]
        for name, what in (
            ("cce, frozen", "hidden"),
            ("cce, trained", "hidden"),
            ("cce, trained", "head"),
            (f"{small}, whole head, trained", "head"),
        )
    }
    claims = [
        claim("frozen head: extra bytes / plain", ratios["frozen: extra_mib, cce / plain"], at_most=1 / 50),
        claim("packed head: extra bytes / plain", ratios["packed: extra_mib, cce / plain"], at_most=1 / 50),
        claim("trained head: extra bytes / plain", ratios["trained: extra_mib, cce / plain"], at_most=1 / 4),
        *(claim(f"error of the gradient, 1e-6: {name}", error, at_most=10) for name, error in millionths.items()),
        claim("filtered: cosine with the exact gradient", errors[f"{small}, trained"]["cosine"], at_least=0.995),
        claim("share of entries at or above the filter", errors["text"]["share at or above the filter"], at_most=0.005),
        claim("tiles left out, sorted less in order", shares[small] - shares[f"{small}, unsorted"], at_least=0),
    ]
    if args.rounds:
        claims.append(claim("frozen head: time / plain", ratios["frozen: processor_seconds, cce / plain"], at_most=1))
    config = {"tokens": n, "rounds": args.rounds, "threads": args.threads}
    results = measured | {"errors": errors, "tiles left out": shares}
    record = {"config": config, "card": facts, "results": results, "ratios": ratios, "claims": claims}
    save(f"train/cce_{args.name}", record, "torch")


if __name__ == "__main__":
    main()
