"""Spec strings: ``snapkv(keep=1024) > kivi(bits=2)``, parsed into techniques and printed back.

Grammar::

    composition = technique (">" technique)*         left wraps right
    technique   = name [ "(" knob "=" value ("," knob "=" value)* ")" ]
    value       = integer | number | true | false | name

The names come from the registry, so the parser never needs editing. Printing leaves out the knobs at their defaults,
and ``parse(print(x)) == x`` for every composition.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from barefoot.core.errors import InvalidInput, unknown_name
from barefoot.core.technique import Technique

_NAME = r"[a-z_][a-z0-9_]*"
_TECHNIQUE = re.compile(rf"\s*({_NAME})\s*(?:\(([^()]*)\))?\s*")
_KNOB = re.compile(rf"\s*({_NAME})\s*=\s*([^\s=,]+)\s*")


def _kinds(annotation: Any) -> tuple[type, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return tuple({type(value) for value in typing.get_args(annotation)})
    return (annotation,)


def _value(text: str, annotation: Any, where: str) -> Any:
    kinds = _kinds(annotation)
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    if type(None) in kinds and text == "none":
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    expected = " or ".join("true or false" if k is bool else "none" if k is type(None) else k.__name__ for k in kinds)
    raise InvalidInput(f"{where}: got {text!r}, expected {expected}")


def _technique(text: str, known: Mapping[str, type[Technique]], family: str) -> Technique:
    match = _TECHNIQUE.fullmatch(text)
    if match is None:
        raise InvalidInput(f"can't read {text.strip()!r} in a {family} spec", cure="write it as name(knob=value, …)")
    name, arguments = match.group(1), match.group(2)
    if name not in known:
        raise unknown_name(f"{family} technique", name, known)
    cls = known[name]
    annotations = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for part in (arguments or "").split(",") if (arguments or "").strip() else []:
        knob = _KNOB.fullmatch(part)
        if knob is None:
            raise InvalidInput(f"can't read {part.strip()!r} in {text.strip()!r}", cure="write knobs as name=value")
        key = knob.group(1)
        if key not in cls.knobs():
            raise unknown_name(f"knob of {name}", key, cls.knobs())
        if key in values:
            raise InvalidInput(f"{name}: knob {key!r} is given twice")
        values[key] = _value(knob.group(2), annotations[key], f"{name}({key}=…)")
    required = [k for k, default in cls.knobs().items() if default is dataclasses.MISSING and k not in values]
    if required:
        raise InvalidInput(f"{name} needs {', '.join(f'{k}=' for k in required)}")
    return cls(**values)


def parse_composition(text: str, known: Mapping[str, type[Technique]], family: str) -> tuple[Technique, ...]:
    """Techniques of a composition, outermost first.

    Parameters
    ----------
    text : the spec string.
    known : name → technique class, from :func:`barefoot.core.registry.techniques`.
    family : the family's name, for messages.

    Raises
    ------
    InvalidInput : unreadable text, unknown name or knob, or a value of the wrong kind or out of range.
    """
    if not text.strip():
        raise InvalidInput(f"the {family} spec is empty; known: {', '.join(sorted(known))}")
    return tuple(_technique(part, known, family) for part in text.split(">"))


def _print_value(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def format_technique(technique: Technique) -> str:
    """``name(knob=value)`` with the knobs that differ from their defaults."""
    knobs = [
        f"{key}={_print_value(getattr(technique, key))}"
        for key, default in technique.knobs().items()
        if getattr(technique, key) != default
    ]
    return f"{technique.name}({','.join(knobs)})" if knobs else technique.name


def format_composition(techniques: Sequence[Technique]) -> str:
    """The spec string of techniques, outermost first."""
    return " > ".join(format_technique(t) for t in techniques)
