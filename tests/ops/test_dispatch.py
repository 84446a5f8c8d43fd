"""Which layout is chosen, and when the machine is measured again. Times are invented."""

from __future__ import annotations

import json

import pytest

from barefoot import ops
from barefoot.ops import dispatch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    return tmp_path


def table(**seconds):
    small = {layout: {"rows": 3.0, "panels": 1.0, "lut": 2.0}[layout] for layout in ("rows", "panels", "lut")}
    return {"seconds": {kind: {"small": small, "large": {**small, **seconds}} for kind in dispatch.KINDS}}


def test_the_fastest_of_the_layouts_that_exist():
    assert dispatch.choose("int2_g64_asym", 64, 128, table()) == "panels"
    assert dispatch.choose("int2_g64_asym", 4096, 4096, table(lut=0.5)) == "lut"
    assert dispatch.choose("int2_g64_asym", 4096 + 16, 4096, table(lut=0.5)) == "panels"  # no whole panels of 64 rows
    assert dispatch.choose("q8_0", 4096, 4096, table(lut=0.5)) == "panels"
    assert dispatch.choose("int2_g64_asym", 4096, 4096, table(rows=0.1)) == "rows"
    assert dispatch.choose("q4_k", 4096, 4096, table(lut=0.5)) == "panels"
    assert dispatch.choose("tq1_0", 4096, 4096, table(lut=0.5)) == "rows"
    assert dispatch.choose("f16", 64, 64, table()) == "rows"


def test_formats_share_the_measurement_of_their_kind():
    only_ternary = table()
    only_ternary["seconds"]["2, no minimum"] = {"small": {"rows": 1, "panels": 2, "lut": 0.5}, "large": {}}
    assert dispatch.choose("ternary_g32", 64, 128, only_ternary) == "lut"
    assert dispatch.choose("int2_g32_sym", 64, 128, only_ternary) == "lut"
    assert dispatch.choose("int2_g32_asym", 64, 128, only_ternary) == "panels"


def test_without_a_measurement(cache):
    assert dispatch.cached() is None
    assert dispatch.choose("int1_g128_asym", 64, 128) == "panels"
    assert dispatch.choose("q4_0", 33, 32) == "rows"


def test_measured_once_for_each_machine_backend_and_number_of_threads(cache, threads, monkeypatch):
    calls = []

    def timer(work):
        work()
        calls.append(None)
        return 1.0 / len(calls)  # later is faster: the last layout in turn wins

    monkeypatch.setattr(dispatch, "SHAPES", {"small": (64, 256), "large": (128, 256)})
    monkeypatch.setattr(dispatch, "REPEATS", {"small": 2, "large": 1})
    threads(1)
    measured = dispatch.measure(timer)
    n_layouts = 6 * 3 + 2 * 2  # all three up to 4 bits; rows and panels of 5 and 8
    assert len(calls) == n_layouts * (2 + 1)
    assert dispatch.cached() == measured
    assert dispatch.choose("int3_g64_asym", 64, 256) == "lut"
    assert dispatch.choose("q5_0", 64, 256) == "panels"
    threads(2)
    assert dispatch.cached() is None
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
