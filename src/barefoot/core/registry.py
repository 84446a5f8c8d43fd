"""Finding techniques: whatever lies in a family's folder belongs to the family.

A family is a package below ``barefoot`` whose ``__init__`` sets ``ROLE`` to the abstract class of its techniques. The
folders named in ``BAREFOOT_TECHNIQUES`` (separated as in PATH), laid out in the same way (``kv/stores/mine.py``), are
searched as well. They hold code that the user chose to run; nothing is ever taken from a model's files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeGuard

import barefoot
from barefoot.core.errors import InvalidInput
from barefoot.core.technique import Technique

PATH_VARIABLE = "BAREFOOT_TECHNIQUES"


@functools.cache
def families() -> tuple[str, ...]:
    """All families, as dotted paths below ``barefoot`` (``"kv.stores"``), sorted."""
    found = []
    for module in pkgutil.walk_packages(barefoot.__path__, "barefoot."):
        if module.ispkg and hasattr(importlib.import_module(module.name), "ROLE"):
            found.append(module.name.removeprefix("barefoot."))
    return tuple(sorted(found))


def _extra_modules(family: str) -> list[ModuleType]:
    modules = []
    for root in filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep)):
        for file in sorted(Path(root, *family.split(".")).glob("[a-z]*.py")):
            name = f"barefoot.{family}._extra_{file.stem}"
            if name not in sys.modules:
                spec = importlib.util.spec_from_file_location(name, file)
                if spec is None or spec.loader is None:
                    raise InvalidInput(f"can't load the technique file {file}")
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                spec.loader.exec_module(module)
            modules.append(sys.modules[name])
    return modules


def _is_technique(value: Any, role: type[Technique]) -> TypeGuard[type[Technique]]:
    """Whether ``value`` is a final class of that role: abstract ones have no name of their own."""
    return isinstance(value, type) and issubclass(value, role) and "name" in vars(value)


@functools.cache
def techniques(family: str) -> MappingProxyType[str, type[Technique]]:
    """Name → class of every technique of ``family`` (for example ``"weights.formats"``), sorted by name.

    Raises
    ------
    InvalidInput : no such family, or two techniques of it share a name.
    """
    if family not in families():
        raise InvalidInput(f"no technique family {family!r}; known: {', '.join(families())}")
    package = importlib.import_module(f"barefoot.{family}")
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    found: dict[str, type[Technique]] = {}
    for module in modules + _extra_modules(family):
        for cls in vars(module).values():
            if _is_technique(cls, package.ROLE) and cls.__module__ == module.__name__:
                if found.setdefault(cls.name, cls) is not cls:
                    raise InvalidInput(f"two techniques of {family} are named {cls.name!r}")
                cls.family = family
    return MappingProxyType(dict(sorted(found.items())))
