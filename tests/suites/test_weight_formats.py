"""Every weight format of the registry, found and tested on arrival: exact bytes, round trips, honest refusals."""

import numpy as np
import pytest

from barefoot.core.errors import Incompatible
from barefoot.core.registry import techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.ops import blocks
from barefoot.ops.grids import Shifted, Uniform

FAMILY = "weights.formats"
HALF_UNITS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}  # half a unit in the last place, relative
KNOWN = techniques(FAMILY)
SHAPES = [(1, 128), (7, 256), (48, 384), (33, 576), (5, 100)]  # one row, odd rows, a wide group's tail, no group at all


def variants():
    """Every format at its defaults, and every other value of each knob that is written as a choice in its module."""
    found = {}
    for name, cls in KNOWN.items():
        found[name] = cls()
        module = __import__(cls.__module__, fromlist=["_"])
        choices = {"bits": getattr(module, "BITS", ()), "group": getattr(module, "GROUPS", ())}
        for knob, values in choices.items():
            for value in values if knob in cls.knobs() else ():
                variant = cls(**{knob: value})
                found[str(variant)] = variant
    return found


VARIANTS = variants()


@pytest.fixture(params=VARIANTS)
def fmt(request):
    return VARIANTS[request.param]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_terms_are_the_bytes_of_the_encoded_matrix(fmt, rows, cols):
    layout = fmt.layout("f32")
    weights = np.random.default_rng(rows).standard_normal((rows, cols), np.float32)
    if cols % blocks.block_elements(layout):
        with pytest.raises(Incompatible, match=str(cols)):
            fmt.terms("w", rows, cols, "f32")
        with pytest.raises(Incompatible, match=str(cols)):
            blocks.encode(layout, weights)
    else:
        assert sum(term.bytes for term in fmt.terms("w", rows, cols, "f32")) == blocks.encode(layout, weights).nbytes


def test_encoding_what_was_decoded_changes_nothing(fmt):
    layout = fmt.layout("f32")
    if isinstance(blocks.lookup(layout).grid, Shifted):
        return  # its lowest code is a magnitude of the next exponent, by which a group that holds it is rounded anew
    weights = np.random.default_rng(3).standard_normal((16, 384), np.float32)
    once = blocks.decode(layout, blocks.encode(layout, weights), 384)
    twice = blocks.decode(layout, blocks.encode(layout, once), 384)
    step = np.abs(once - weights).max() * 2
    assert np.abs(twice - once).max() <= step * 2e-3 + 1e-7


def is_uniform(fmt) -> bool:
    return isinstance(blocks.lookup(fmt.layout("f32")).grid, Uniform) and hasattr(fmt, "symmetric")


def errors(fmt, weights: np.ndarray) -> np.ndarray:
    layout = fmt.layout("f32")
    return np.abs(blocks.decode(layout, blocks.encode(layout, weights), weights.shape[1]) - weights)


@pytest.mark.parametrize("name", [n for n, f in VARIANTS.items() if not is_uniform(f)])
def test_a_format_without_a_uniform_grid_stays_within_its_block(name):
    fmt, weights = VARIANTS[name], np.random.default_rng(4).standard_normal((8, 128), np.float32)
    error, layout = errors(fmt, weights), fmt.layout("f32")
    if layout in HALF_UNITS:
        assert (error <= HALF_UNITS[layout] * 1.001 * np.abs(weights)).all()
    else:  # a grid of the format's own; its tests hold it to its equations
        groups = np.abs(weights).reshape(-1, blocks.block_elements(layout))
        assert (error.reshape(groups.shape).max(axis=1) < groups.max(axis=1)).all()


@pytest.mark.parametrize("name", [n for n, f in VARIANTS.items() if is_uniform(f)])
def test_error_is_at_most_the_step_that_the_bits_allow(name):
    """A uniform grid of L levels over a group's range r has steps r / (L - 1); f16 scales add 2^-11 of the range."""
    fmt, weights = VARIANTS[name], np.random.default_rng(4).standard_normal((8, 384), np.float32)
    groups = weights.reshape(8, -1, fmt.group)
    largest = np.abs(groups).max(axis=-1)
    if fmt.symmetric:  # the largest magnitude sits on code 0; the other side ends one step earlier
        bound = largest / 2 ** (fmt.bits - 1)
    else:
        bound = np.ptp(groups, axis=-1) / (2**fmt.bits - 1) / 2
    assert (errors(fmt, weights).reshape(groups.shape).max(axis=-1) <= bound + largest * 2**-9).all()


def test_spec_string_round_trips(fmt):
    assert parse_composition(format_technique(fmt), KNOWN, FAMILY) == (fmt,)


def test_docstring_states_the_bytes(fmt):
    module = __import__(type(fmt).__module__, fromlist=["_"])
    assert module.__doc__.startswith(f"{fmt.name} — ")
    assert "ytes" in module.__doc__
