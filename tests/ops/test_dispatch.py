"""Which layout is chosen, and when the machine is measured again. Times are invented."""

from __future__ import annotations

import json

import pytest

from barefoot import ops
from barefoot.core.device import this_machine, usable_threads
from barefoot.core.errors import InvalidInput
from barefoot.ops import dispatch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    return tmp_path


def table(large=None, prompt=None):
    """Seconds a token: panels 1, look-ups 2, rows 3; of large matrices, and of prompts with them, as given."""
    plain = {"rows": 3.0, "panels": 1.0, "lut": 2.0}
    seconds, prompt_seconds = (
        {kind: {"small": plain, "large": plain | (changed or {})} for kind in dispatch.KINDS}
        for changed in (large, prompt)
    )
    return {"seconds": seconds, "prompt_seconds": prompt_seconds}


def test_what_is_chosen_where_it_exists():
    layouts = {"2/large": "lut", "2-sym/small": "lut", "3/small": "rows", "8/large": "lut"}
    assert dispatch.choose("int2_g64_asym", 4096, 4096, layouts) == "lut"
    assert dispatch.choose("int2_g64_asym", 4096 + 16, 4096, layouts) == "panels"  # no whole panels of 64 rows
    assert dispatch.choose("int2_g64_asym", 4096 + 1, 4096, layouts) == "rows"
    assert dispatch.choose("int2_g64_asym", 64, 128, layouts) == "panels"  # small
    assert dispatch.choose("int3_g64_asym", 64, 128, layouts) == "rows"
    assert dispatch.choose("q8_0", 4096, 4096, layouts) == "panels"  # no look-ups with 8 bits
    assert dispatch.choose("q4_k", 4096, 4096, layouts) == "panels"
    assert dispatch.choose("tq1_0", 4096, 4096, layouts) == "rows"
    assert dispatch.choose("f16", 64, 64, layouts) == "rows"


def test_formats_share_the_measurement_of_their_kind():
    assert dispatch.class_of("ternary_g32", 64, 128) == "2-sym/small"
    assert dispatch.class_of("int2_g32_sym", 64, 128) == "2-sym/small"
    assert dispatch.class_of("int2_g32_asym", 1024, 2048) == "2/small"
    assert dispatch.class_of("int2_g32_asym", 1024, 2048 + 32) == "2/large"
    assert dispatch.class_of("int3_g64_sym", 64, 128) == "3/small"
    assert dispatch.class_of("q6_k", 64, 256) is None


def test_only_what_is_clearly_faster_leaves_the_panels():
    assert dispatch.faster(table()) == {}
    everywhere = {f"{kind}/large": "lut" for kind in dispatch.KINDS}
    assert dispatch.faster(table({"lut": 0.5}, {"lut": 1.0})) == everywhere
    assert dispatch.faster(table({"lut": 0.5}, {"lut": 1.45})) == {}  # 1.95 of 2: within the margin
    assert dispatch.faster(table({"lut": 0.5}, {"lut": 1.6})) == {}  # slower prompts cost more than answers gain
    assert set(dispatch.faster(table({"rows": 0.1, "lut": 0.2}, {"rows": 0.1, "lut": 0.2})).values()) == {"rows"}


def test_layouts_survive_their_text():
    layouts = {"2-sym/large": "lut", "3/small": "rows"}
    assert dispatch.parse_layouts(dispatch.format_layouts(layouts)) == layouts
    assert dispatch.format_layouts({}) == "panels"
    assert dispatch.parse_layouts("panels") == {}
    for text in ("lut", "2=lut", "2/large=tiles", "7/large=lut"):
        with pytest.raises(InvalidInput, match="can't read the layouts"):
            dispatch.parse_layouts(text)


def test_without_a_measurement(cache):
    assert dispatch.cached() is None
    assert dispatch.faster(dispatch.cached()) == {}
    assert dispatch.choose("int1_g128_asym", 64, 128, {}) == "panels"
    assert dispatch.choose("q4_0", 33, 32, {}) == "rows"


def test_measured_once_for_each_machine_backend_and_number_of_threads(cache, threads, monkeypatch):
    calls = []

    def timer(work):
        work()
        calls.append(None)
        return 0.5 ** len(calls)  # later is faster: the last layout in turn wins

    monkeypatch.setattr(dispatch, "SHAPES", {"small": (64, 256), "large": (128, 256)})
    monkeypatch.setattr(dispatch, "REPEATS", {"small": 2, "large": 1})
    monkeypatch.setattr(dispatch, "PROMPT_REPEATS", {"small": 1, "large": 1})
    threads(1)
    measured = dispatch.measure(timer)
    n_layouts = 6 * 3 + 2 * 2  # all three up to 4 bits; rows and panels of 5 and 8
    assert len(calls) == n_layouts * (2 + 1 + 2)
    assert dispatch.cached() == measured
    assert measured["prompt_seconds"]["8"]["large"]["panels"] == 0.5 ** len(calls) / dispatch.PROMPT_TOKENS
    chosen = dispatch.faster(measured)
    assert chosen["3/small"] == "lut"
    assert "5/small" not in chosen
    assert this_machine().layouts == (chosen if usable_threads() == 1 else {})
    threads(2)
    assert dispatch.cached() is None
    assert dispatch.cached(1) == measured
    threads(1)
    assert dispatch.cached() == measured
    before = ops.isa()
    ops.set_isa("portable" if ops._native else "numpy")
    assert (dispatch.cached() is None) == (ops.isa() != before)
    ops.set_isa(before)
    stored = json.loads(dispatch.path().read_text())
    dispatch.path().write_text(json.dumps({**stored, "version": dispatch.VERSION + 1}))
    assert dispatch.cached() is None
    dispatch.path().write_text("{")
    assert dispatch.cached() is None
