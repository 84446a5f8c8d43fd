"""List the benchmarks, or run one: ``python -m benchmarks [NAME [ARGUMENT ...]]``.

A benchmark is a module below this folder with a ``main`` and, as first line of its docstring, what it measures.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name (``"run.llama_cpp"``) → first line of the docstring, by name; nothing is imported."""
    found = {}
    for path in sorted(HERE.glob("*/*.py")):
        module = ast.parse(path.read_text("utf-8"))
        title = (ast.get_docstring(module) or "").partition("\n")[0]
        if title and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[".".join(path.relative_to(HERE).with_suffix("").parts)] = title
    return found


def main() -> None:
    names = benchmarks()
    if len(sys.argv) < 2:
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {title}" for name, title in names.items()))
        print("\nrun one: python -m benchmarks NAME [ARGUMENT ...], or make bench BENCH='NAME ARGUMENT ...'")
        return
    name = sys.argv[1]
    if name not in names:
        raise SystemExit(f"no benchmark {name!r}; there are {', '.join(names)}")
    del sys.argv[0]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
