"""Write ``src/barefoot/plan/quality.toml`` from the records of benchmarks/quality/formats.py and kv.py.

    python -m benchmarks.quality.table

A record of formats on a model with float weights (or a dithered one) gives one row; on a quantized file a row for each
stored type that all matrices of some group share. A record of caches gives one row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

TARGET = Path(__file__).parents[2] / "src/barefoot/plan/quality.toml"
HEAD = """\
# What each format costs in quality: mean KL divergence in nats a token, against the reference that `stored` names,
# when only that group of matrices (or the KV cache) is in the format and all else is as stored.
# Written by benchmarks/quality/table.py from benchmarks/results/quality_*.json; not by hand.
#
#   model, parameters   the model that it was measured on, and its size
#   stored              what the matrices were before: "float" (floats, or a dithered reference), or a stored type such
#                       as "q4_1", whose own grid the format may meet; "any" where only caches differ
#   source              the benchmark's result file and date
#   kl.GROUP            format (a spec string) = nats, for the groups embed, attn, ffn, head and kv; embed of a tied
#                       model includes the head, and stands for the head of untied ones too
#   policies            KV policy over 16 bits = [positions of the prompt, entries that stay of them, nats], KEEP in its
#                       spec being those entries: what it costs depends on the share, and on what the text needs
#   windows             whether some of the model's layers see a window only; no policy rules those
#   int8_inputs         what int8 activations cost in all matrices together; in every plan alike, so not in any sum
#
# The planner chooses among the formats that are named here, and "stored"; of policies, among the shares.
"""


def rows(name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    kl: dict[str, dict[str, float]] = {k: v for k, v in record["kl"].items() if k not in ("all", "activations", "kv")}
    if "head" not in kl:
        kl["head"] = kl["embed"]
    config = record["config"]
    base = {
        "model": record["name"].split("/")[1].rsplit("-", 1)[0],
        "parameters": config["parameters"],
        "source": f"{name}, {record['date']}",
    }
    if config["stored"] == "float":
        return [base | {"stored": "float", "kl": kl}]
    groups = record["config"]["stored_types"]
    groups.setdefault("head", groups["embed"])
    kinds = sorted({kind for types in groups.values() for kind in types})
    found = []
    for kind in kinds:
        mine = {group: kl[group] for group, types in groups.items() if types == [kind] and group in kl}
        if mine:
            found.append(base | {"stored": kind, "kl": mine, "int8_inputs": record["kl"]["activations"]["int8"]})
    return found


def cache_row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    config = record["config"]
    return {
        "model": record["name"].removeprefix("quality/kv_"),
        "parameters": config["parameters"],
        "source": f"{name}, {record['date']}",
        "stored": "any",
        "windows": config["n_windows"] > 0,
        "kl": {"kv": record["stores"]},
        "policies": record["policies"],
    }


def text(row: dict[str, Any]) -> str:
    plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
    lines = ["[[row]]"] + [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    lines += ["", "[row.kl]"]
    for group, table in row["kl"].items():
        lines.append(f"{group} = {{ " + ", ".join(f"{json.dumps(k)} = {v}" for k, v in table.items()) + " }")
    if "policies" in row:
        lines += ["", "[row.policies]", *(f"{json.dumps(spec)} = {points}" for spec, points in row["policies"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    found = []
    for path in sorted(RESULTS.glob("quality_*.json")):
        name, record = f"benchmarks/results/{path.name}", json.loads(path.read_text())
        if path.name.startswith("quality_kv_"):
            found.append(cache_row(name, record))
        elif "kl" in record:
            found += rows(name, record)
    TARGET.write_text(HEAD + "\n" + "\n".join(text(row) for row in found))
    print(f"{len(found)} rows in {TARGET}")


if __name__ == "__main__":
    main()
