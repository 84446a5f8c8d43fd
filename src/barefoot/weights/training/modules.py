"""Modules that multiply by something else than their weight for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def replaced(
    weights: Mapping[nn.Module, nn.Module], inputs: Mapping[nn.Module, Callable[[Any], Any]]
) -> Iterator[None]:
    """While this lasts, ``weights[m](m.weight)`` stands in the place of a module's weight, and ``inputs[m](x)`` in that
    of the first positional argument of its ``forward``. Afterwards the modules hold their own weights again."""
    hooks = []
    try:
        for module, change in weights.items():
            parametrize.register_parametrization(module, "weight", change, unsafe=True)
        for module, changed in inputs.items():

            def first(_: nn.Module, args: tuple[Any, ...], changed: Callable[[Any], Any] = changed) -> tuple[Any, ...]:
                return changed(args[0]), *args[1:]

            hooks.append(module.register_forward_pre_hook(first))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in weights:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
