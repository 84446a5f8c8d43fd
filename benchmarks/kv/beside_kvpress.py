"""The same contexts in the same stored bytes, compressed here and by kvpress: divergence, retrieval, bytes held.

    python -m benchmarks kv.beside_kvpress FOLDER NAME --text FILE --kvpress-python PYTHON [--length 1000] [--keep 200]
        [--passages 3] [--presses PRESS ...] [--timed]

FOLDER is one of floats (``barefoot export FILE --to barefoot``). kvpress leaves --keep entries of each key head behind
a prompt and appends what follows. Ours of the same method may hold as many bytes, positions and scores included, as
kvpress does at the end (:func:`keep_of`): what sends entries away while it decodes has all of that from the beginning.
Arms with KEPT hold --keep entries as kvpress does behind the prompt, and so fewer bytes later. Each of ours runs in the
engine and in transformers (``barefoot.transformers.KVCache``), which must agree.

Divergence is KL to transformers' full cache, teacher-forced along 128 tokens behind passages; retrieval are needles and
lists of :mod:`barefoot.evals.long_context`, whose questions come behind the compressed context. A difference counts
where it is beyond two standard errors of the tokens' own differences. Speed is only claimed with --timed, on a machine
at rest. With --presses, others stay in the record as they are where its settings are the same.
What transformers' cache refuses runs in the engine alone, and holds what that allocates.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import log_softmax
from barefoot.evals.long_context.continuation import LEAST
from barefoot.evals.long_context.prompts import chat_form
from barefoot.evals.long_context.suite import Size, suite
from barefoot.evals.texts import read_text
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.ruled import Ruled
from barefoot.ops import kvrows
from barefoot.plan.job import parse_kv
from benchmarks.harness import RESULTS, card, child, claim, save

WORKER = Path(__file__).with_name("kvpress_worker.py")
MANY = 1 << 30
DEPTHS = (0.1, 0.5, 0.9)
Halves = npt.NDArray[np.float16]

# Of kvpress: press, its knobs, whether it takes entries; and ours of the same method.
PAIRS: tuple[tuple[str, Mapping[str, Any], bool, tuple[str, ...]], ...] = (
    ("ObservedAttentionPress", {}, True, ("h2o(keep=KEEP) > f32", "h2o(keep=KEPT) > f32")),
    (
        "SnapKVPress",
        {"window_size": 64},
        True,
        ("snapkv(keep=KEEP,window=64,room=ROOM) > f32", "snapkv(keep=KEEP,window=64,room=ROOM) > q8"),
    ),
    ("StreamingLLMPress", {}, True, ("sinks(keep=KEEP) > f32",)),
    ("RandomPress", {}, True, ("random(keep=KEEP) > f32",)),
    ("ExpectedAttentionPress", {}, True, ()),
    ("KnormPress", {}, True, ()),
    ("ThinKPress", {"key_channel_compression_ratio": 0.5}, False, ("think(ratio=0.5) > f32",)),
)


@dataclass(frozen=True)
class Turn:
    """What passes behind a prompt: ``then`` at once, ``fed`` one by one; ``targets`` are foreseen behind each."""

    then: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Turns that all follow a prompt directly."""

    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]

    @property
    def targets(self) -> list[int]:
        return [token for turn in self.turns for token in turn.targets]


Tasks = dict[str, tuple[Group, ...]]
Rows = dict[str, list[Halves]]  # task → log-probabilities of each group


def tasks_of(checkpoint: Checkpoint, text: str, length: int, n_passages: int) -> Tasks:
    tokenizer = load_tokenizer(checkpoint)
    form = chat_form(find_chat_template(checkpoint), tokenizer)
    made = suite(
        read_text(text), tokenizer, form, length,
        size=Size(n_needles=1, depths=DEPTHS, n_lists=1, n_shared=1, n_copies=1, n_passages=n_passages),
    )  # fmt: skip
    retrieval = {
        name: tuple(
            Group(s.prompt, tuple(Turn(t.question + t.opening, t.answer[:-1], t.answer) for t in s.turns))
            for s in sessions
        )
        for name, sessions in (("needles", made.needles), ("lists", made.lists))
    }
    along = tuple(Group(p.prompt, (Turn((), p.continuation[:-1], p.continuation[1:]),)) for p in made.passages)
    return {"passages": along, **retrieval}


def keep_of(arm: str, row: int, groups: Sequence[Group], kept: int) -> str:
    """The composition of an arm: KEEP is the most with which no more bytes are held than by ``kept`` and all that is
    appended, in rows of floats of ``row`` bytes."""
    room = max(len(turn.then) + len(turn.fed) for group in groups for turn in group.turns)
    kv = arm.replace("KEPT", str(kept)).replace("ROOM", str(room))
    probe = parse_kv(kv.replace("KEEP", "1000"))
    if not isinstance(probe, Ruled) or probe.policy is None:
        return kv
    entry = 2 * kvrows.row_bytes(probe.row_format, row // 4) + 4 + 4 * (probe.policy.observes == "mass")
    further = probe.policy.slots(MANY) - 1000
    return kv.replace("KEEP", str((kept + room) * 2 * row // entry - further))


def halves(rows: Sequence[npt.NDArray[np.float32]]) -> Halves:
    return np.maximum(log_softmax(np.array(rows)), LEAST).astype(np.float16)


class InTransformers:
    """Ours, and the full cache, in transformers."""

    def __init__(self, folder: str, n_threads: int) -> None:
        import torch
        import transformers

        import barefoot.transformers  # noqa: F401 - registers the folder

        torch.set_num_threads(n_threads)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, kv: str, groups: Sequence[Group]) -> tuple[list[Halves], dict[str, float]]:
        from barefoot.transformers import KVCache

        found, behind, most, seconds, n = [], 0, 0, 0.0, 0
        for group in groups:
            cache, rows = KVCache(self._model, kv), []
            self._pass(cache, group.prompt)
            behind = max(behind, cache.bytes)
            for turn in group.turns:
                branch = copy.deepcopy(cache)
                rows += [self._pass(branch, turn.then)] if turn.then else []
                started = time.perf_counter()
                for token in turn.fed:
                    rows.append(self._pass(branch, [token]))
                    most = max(most, branch.bytes)
                seconds, n = seconds + time.perf_counter() - started, n + len(turn.fed)
            found.append(halves(rows))
        return found, {"bytes_behind_prompt": behind, "most_bytes": most, "decode_ms": 1000 * seconds / n}

    def _pass(self, cache: Any, ids: Sequence[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1].numpy()


def in_engine(checkpoint: Checkpoint, kv: str, groups: Sequence[Group], n_threads: int) -> tuple[list[Halves], int]:
    """Log-probabilities, and the bytes of a sequence's entries."""
    room = max(len(turn.then) + len(turn.fed) for group in groups for turn in group.turns)
    config = EngineConfig(
        context=max(len(group.prompt) for group in groups) + room,
        kv=parse_kv(kv), chunk=128, activations="float32", n_threads=n_threads, n_sequences=2,
    )  # fmt: skip
    found = []
    with Engine(checkpoint, model_spec(checkpoint), config) as engine:
        for group in groups:
            engine.reset(0)
            engine.prefill(group.prompt)
            rows = []
            for turn in group.turns:
                engine.fork(0, 1)
                rows += [engine.prefill(turn.then, sequence=1).copy()] if turn.then else []
                rows += [engine.decode(token, 1).copy() for token in turn.fed]
            found.append(halves(rows))
        return found, engine.footprint.select(kind="kv", phase="decode").bytes // config.n_sequences


def in_kvpress(settings: Mapping[str, Any], tasks: Tasks, python: str) -> tuple[Rows, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "tasks.json"
        plain = {task: [asdict(group) for group in groups] for task, groups in tasks.items()}
        file.write_text(json.dumps(plain))
        facts = child(WORKER, {**settings, "tasks": str(file), "out": out}, python, timeout=7200)
        rows = {
            task: [np.load(Path(out) / f"{task}-{i}.npy") for i in range(len(groups))] for task, groups in tasks.items()
        }
    return rows, facts


def kls(reference: Sequence[Halves], rows: Sequence[Halves]) -> npt.NDArray[np.float64]:
    """Of each token, in nats."""
    found = []
    for p, q in _pairs(reference, rows):
        found.append(np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0))
    return np.concatenate(found)


def nlls(groups: Sequence[Group], rows: Sequence[Halves]) -> npt.NDArray[np.float64]:
    """Of each right token, in nats."""
    return np.concatenate(
        [-r[np.arange(len(r)), g.targets].astype(np.float64) for g, r in zip(groups, rows, strict=True)]
    )


def _pairs(reference: Sequence[Halves], rows: Sequence[Halves]) -> Iterator[tuple[Any, Any]]:
    for whole, others in zip(reference, rows, strict=True):
        yield from zip(
            np.array_split(whole.astype(np.float64), 8), np.array_split(others.astype(np.float64), 8), strict=True
        )


def judged(tasks: Tasks, full: Rows, rows: Rows) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for task, groups in tasks.items():
        right = [(r.argmax(-1) == g.targets) for g, r in zip(groups, rows[task], strict=True)]
        exact, at = [], 0
        for g, r in zip(groups, right, strict=True):
            at = 0
            for turn in g.turns:
                exact.append(bool(r[at : at + len(turn.targets)].all()))
                at += len(turn.targets)
        found[task] = {
            "kl": float(kls(full[task], rows[task]).mean()),
            "nll": float(nlls(groups, rows[task]).mean()),
            "right_tokens": float(np.concatenate(right).mean()),
            "n_tokens": sum(map(len, right)),
            "exact": sum(exact) / len(exact),
            "n_answers": len(exact),
        }
    return found


def not_worse(what: str, ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The mean difference, and the claim that it is no more than two of its standard errors."""
    difference = ours - theirs
    error = float(difference.std() / len(difference) ** 0.5)
    made = claim(f"{what}, ours less theirs", float(difference.mean()), at_most=round(2 * error, 4))
    return {**made, "ours": float(ours.mean()), "theirs": float(theirs.mean())}


def recorded(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run with the same settings, if there is one."""
    path = RESULTS / f"kv_beside_kvpress_{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("config") == config else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("name", help="of the record: beside_kvpress_NAME")
    parser.add_argument("--text", required=True)
    parser.add_argument("--kvpress-python", required=True)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=200)
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--presses", nargs="+", default=[press for press, *_ in PAIRS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timed", action="store_true")
    args = parser.parse_args()
    config = {"text": Path(args.text).name, "length": args.length, "keep": args.keep, "passages": args.passages}
    config |= {"threads": args.threads, "timed": args.timed}
    card(f"beside kvpress on {args.name}", config)
    with Checkpoint(args.folder) as checkpoint:
        tasks = tasks_of(checkpoint, args.text, args.length, args.passages)
        row = 4 * model_spec(checkpoint).head_dim
        driver = InTransformers(args.folder, args.threads)
        whole = {task: driver.run("f32", groups) for task, groups in tasks.items()}
        full = {task: rows for task, (rows, _) in whole.items()}
        results: dict[str, Any] = {
            "full": {"judged": judged(tasks, full, full), "held": {task: held for task, (_, held) in whole.items()}}
        }
        before = recorded(args.name, config)
        again = tuple(arm for press, _, _, arms in PAIRS if press in args.presses for arm in arms)
        results = {**before.get("results", {}), **results}
        claims: list[dict[str, Any]] = [c for c in before.get("claims", ()) if not c["claim"].startswith(again)]
        settings = {"folder": args.folder, "threads": args.threads}
        for press, knobs, takes, arms in PAIRS:
            if press not in args.presses:
                continue
            peer = {**settings, "press": press, "knobs": knobs, "keep": args.keep if takes else None}
            theirs, facts = in_kvpress(peer, tasks, args.kvpress_python)
            results[press] = {"judged": judged(tasks, full, theirs), "held": facts}
            _show(press, results[press])
            for arm in arms:
                ours, engine, held, specs = {}, {}, {}, {}
                for task, groups in tasks.items():
                    specs[task] = keep_of(arm, row, groups, args.keep)
                    engine[task], n_bytes = in_engine(checkpoint, specs[task], groups, args.threads)
                    try:
                        ours[task], held[task] = driver.run(specs[task], groups)
                    except Incompatible:  # what only the engine keeps
                        ours[task], held[task] = engine[task], {"most_bytes": n_bytes}
                results[arm] = {
                    "press": press,
                    "compositions": specs,
                    "judged": judged(tasks, full, ours),
                    "judged_in_engine": judged(tasks, full, engine),
                    "held": held,
                    "kl_of_engine_to_driver": {task: float(kls(ours[task], engine[task]).mean()) for task in tasks},
                }
                _show(arm, results[arm])
                claims += _claims(arm, press, tasks, full, ours, engine, theirs, held, facts, timed=args.timed)
            if not args.timed:
                for result in results.values():
                    for held in result["held"].values():
                        held.pop("decode_ms", None)
            record = {"config": config, "results": results, "claims": claims}
            save(f"kv/beside_kvpress_{args.name}", record, "torch", "transformers")


def _show(name: str, result: Mapping[str, Any]) -> None:
    shares = "  ".join(
        f"{task} KL {found['kl']:.4f} NLL {found['nll']:.3f} right {found['right_tokens']:.2f}"
        for task, found in result["judged"].items()
    )
    held = result["held"]["passages"]
    print(f"  {name:44} {held['most_bytes'] / 2**20:6.2f} MiB  {shares}", flush=True)


def _claims(
    arm: str, press: str, tasks: Tasks, full: Rows, ours: Rows, engine: Rows, theirs: Rows, held: Any, facts: Any,
    *, timed: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    if "KEPT" not in arm:
        distances = kls(full["passages"], ours["passages"]), kls(full["passages"], theirs["passages"])
        found.append(not_worse(f"{arm} and {press}: KL along passages", *distances))
        for task in ("needles", "lists"):
            right = nlls(tasks[task], ours[task]), nlls(tasks[task], theirs[task])
            found.append(not_worse(f"{arm} and {press}: nats of a right token of {task}", *right))
    apart = kls(ours["passages"], engine["passages"]).mean() / kls(full["passages"], theirs["passages"]).mean()
    found.append(
        claim(f"{arm}: KL from driver to engine, over kvpress's from the full cache", float(apart), at_most=0.05)
    )
    share = max(held[task]["most_bytes"] / facts[task]["most_bytes"] for task in tasks)
    found.append(claim(f"{arm}: most bytes held, over kvpress's", share, at_most=1.0))
    if timed and "decode_ms" in held["passages"]:
        ratio = held["passages"]["decode_ms"] / facts["passages"]["decode_ms"]
        found.append(claim(f"{arm}: time of a decoded token in transformers, over kvpress's", ratio, at_most=1.5))
    return found


if __name__ == "__main__":
    main()
