"""The subcommands: one module each, found by lying in this folder.

A command's module holds

``HELP``       one line;
``EXAMPLES``   command lines that work, printed below its help and in docs/cli.md;
``JSON_KEYS``  name → meaning of each key of the object that ``--json`` writes;
``configure(parser)``  adds its arguments;
``execute(args) -> int``  does the work and returns the exit code.

Importing it must stay cheap (no numpy): what is heavy is imported inside ``execute``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def all_commands() -> dict[str, ModuleType]:
    """Name → module of every subcommand, by name: a module ``kv_compare`` is ``kv-compare``."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in found}
