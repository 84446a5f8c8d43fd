"""Which low-bit methods hold at 8, 4, 3, 2 and 1 bits: every method of the registry, one protocol, one table.

How Good Are Low-bit Quantized LLaMA3 Models? An Empirical Study (Huang et al. 2024, arXiv:2404.14047) on the models at
hand. A method is a solver on plain integer groups, another number format with the default solver, or a structure; all
come from the registry, each at every width that it offers, in groups of 64 where there is a choice. Embedding and head
are f16 in every row. Each row is a process: a fit on the same text (``--calibration``), then on ``--text`` the second
halves of windows: perplexity, KL to the reference in float32, and as task the words that are foreseen, those of which
every token is the likeliest. Bits are stored bits. A method that fails is a row and says how.

    python -m benchmarks weights.low_bit_study NAME=MODEL [NAME=MODEL ...] --text FILE --calibration FILE
        [--methods gptq,hqq] [--bits 3,2] [--quick] [--folder DIR]

MODEL is a dithered reference (benchmarks/quality/dithered.py). The record, ``results/weights_low_bit_study_NAME.json``,
is written after every row, and rows that it holds with the same settings are not repeated; the table goes beside it as
Markdown. ``--quick`` fits and scores on an eighth of the text and says so in the record.

Not here: fine-tuning of adapters on 4-bit weights (QLoRA, IR-QLoRA), activations of few bits (SmoothQuant), and the
methods of the paper that are not in the registry.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barefoot.core.errors import BarefootError
from barefoot.core.registry import techniques
from barefoot.core.technique import Technique
from barefoot.ops import blocks
from benchmarks.harness import RESULTS, card, child, claim, save

WORKER = Path(__file__).with_name("low_bit_worker.py")
BITS, GROUP = (8, 4, 3, 2, 1), 64
DEFAULT_SOLVER = "mse"
COLLAPSED = 1e4  # a perplexity beyond which the paper counts a method as failed


@dataclass(frozen=True)
class Method:
    """A row of the table before it is measured: ``how`` is of the family ``role``, ``bits`` None without a choice."""

    name: str
    role: str
    how: str
    solver: str
    bits: int | None


def methods() -> Iterator[Method]:
    """Everything that the registry offers, at every width that it accepts."""
    plain = techniques("weights.formats")["int"]
    for solver in techniques("weights.solvers"):
        for bits, how in widths(plain):
            yield Method(solver, "weights.formats", str(how), solver, bits)
    for role in ("weights.formats", "weights.structures"):
        for name, cls in techniques(role).items():
            if cls is not plain and cls.papers:  # those of no paper only give stored blocks a name
                for bits, how in widths(cls):
                    yield Method(name, role, str(how), DEFAULT_SOLVER, bits)


def widths(cls: type[Technique]) -> Iterator[tuple[int | None, Technique]]:
    """The technique at each of ``BITS`` that it offers, or once if it has no such choice; nothing for plain floats."""
    knobs = cls.knobs()
    if dataclasses.MISSING in knobs.values():
        return
    for bits in BITS if "bits" in knobs else (None,):
        chosen = {"bits": bits} if bits is not None else {}
        for group in ({"group": GROUP}, {}) if "group" in knobs else ({},):
            try:
                how = cls(**chosen, **group)
            except BarefootError:
                continue
            layout = getattr(how, "layout", None)
            if layout is None or blocks.lookup(layout("f32")).grid is not None:
                yield bits, how
            break


def table(rows: list[dict[str, Any]], reference: dict[str, float]) -> str:
    head = "| method | format | stored bits | of the model | perplexity | KL, nats | same top | words | fit, s |\n"
    lines = [head, "|" + " --- |" * 9 + "\n"]
    first = (
        "float32",
        "as it is",
        "",
        "",
        reference["reference_perplexity"],
        0.0,
        1.0,
        reference["reference_words"],
        "",
    )
    for cells in (first, *map(cells_of, rows)):
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |\n")
    return "".join(lines)


def cells_of(row: dict[str, Any]) -> tuple[Any, ...]:
    start = (row["method"], f"`{row['how']}`")
    if "failed" in row:
        return (*start, *[""] * 6, row["failed"])
    keys = ("layer_bits", "model_bits", "perplexity", "kl_mean", "same_top", "words", "fit_seconds")
    return (*start, *(float(row[key]) for key in keys))


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The orderings that the paper finds, on the rows that are there."""
    found = []
    there = {(row["method"], row["how"]): row for row in rows if "failed" not in row}
    plain = {bits: str(how) for bits, how in widths(techniques("weights.formats")["int"])}

    def ratio(measure: str, method: str, other: str, bits: int) -> float | None:
        pair = [there.get((name, plain[bits])) for name in (method, other)]
        return None if None in pair else pair[0][measure] / pair[1][measure]  # type: ignore[index]

    for method in sorted({row["method"] for row in rows}):
        steps = [there[method, plain[bits]]["perplexity"] for bits in BITS if (method, plain[bits]) in there]
        if len(steps) > 1:
            worst = min(later / earlier for earlier, later in itertools.pairwise(steps))
            found.append(claim(f"{method}: perplexity rises as bits fall, smallest step, times", worst, at_least=0.999))
    for text, measure, method, other, bits, most in (
        ("3 bits: KL of gptq / of plain rounding", "kl_mean", "gptq", "range", 3, 0.85),
        ("2 bits: perplexity of gptq / of plain rounding", "perplexity", "gptq", "range", 2, 0.5),
    ):
        value = ratio(measure, method, other, bits)
        if value is not None:
            found.append(claim(text, value, at_most=most))
    if (four := there.get(("gptq", plain[4]))) is not None:
        grown = four["perplexity"] / four["reference_perplexity"]
        found.append(
            claim("4 bits are near lossless: gptq, perplexity / the reference's (paper 1.07)", grown, at_most=1.1)
        )
    uniform = [row for (_, how), row in there.items() if how == plain[2]]
    if uniform:
        least = min(row["perplexity"] / row["reference_perplexity"] for row in uniform)
        found.append(
            claim("2 bits collapse for every uniform solver, least perplexity / the reference's", least, at_least=2)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--methods", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--bits", type=lambda text: [int(b) for b in text.split(",")], help="only formats of these")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where fitted models are written, one at a time")
    args = parser.parse_args()
    share = 8 if args.quick else 1
    config = {
        "text": Path(args.text).name,
        "calibration": Path(args.calibration).name,
        "window": args.window,
        "windows": max(1, args.windows // share),
        "calibration_windows": max(1, args.calibration_windows // share),
        "quick": args.quick,
    }
    for each in args.models:
        name, model = each.split("=", 1)
        study(name, model, config, args)


def study(name: str, model: str, config: dict[str, Any], args: argparse.Namespace) -> None:
    path = RESULTS / f"weights_low_bit_study_{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("config") == config else []
    there = {(row["method"], row["how"]) for row in rows}
    chosen = [m for m in methods() if wanted(m, args)]
    card(f"low-bit study of {name}", config | {"rows": len(chosen), "there already": len(there)})
    for method in chosen:
        if (method.name, method.how) in there:
            continue
        row = {
            "method": method.name,
            "how": method.how,
            "solver": method.solver,
            **measured(method, model, config, args),
        }
        rows.append(row)
        print(f"  {method.name:10} {method.how:28} {row.get('failed') or outcome(row)}", flush=True)
        rows.sort(key=lambda r: (r["method"], -r.get("layer_bits", 0)))
        reference = next((r for r in rows if "failed" not in r), None)
        if reference is not None:
            path.with_suffix(".md").write_text(table(rows, reference))
        save(f"weights/low_bit_study_{name}", {"config": config, "rows": rows, "claims": claims(rows)})


def wanted(method: Method, args: argparse.Namespace) -> bool:
    of_bits = args.bits is None or method.bits is None or method.bits in args.bits
    return of_bits and (args.methods is None or method.name in args.methods)


def measured(method: Method, model: str, config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        settings = dataclasses.asdict(method) | config
        settings |= {"model": model, "text": args.text, "calibration": args.calibration, "folder": folder}
        try:
            row = child(WORKER, settings | {"threads": args.threads}, timeout=6 * 3600)
        except RuntimeError as error:
            return {"failed": str(error).strip().splitlines()[-1]}
    if not math.isfinite(row["perplexity"]) or row["perplexity"] > COLLAPSED:
        row["collapsed"] = True
    return row


def outcome(row: dict[str, Any]) -> str:
    return (
        f"{row['layer_bits']:.3f} bits  perplexity {row['perplexity']:.4g}  KL {row['kl_mean']:.4g}  "
        f"words {row['words']:.3f}  fit {row['fit_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
