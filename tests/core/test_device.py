"""Devices: the table, this machine, its cgroup, and the probe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from barefoot.core import device, probe
from barefoot.core.device import known_devices, parse_device, this_machine
from barefoot.core.errors import InvalidInput

SOURCE = str(Path(__file__).parents[2] / "src")


def test_every_known_machine_states_its_numbers_and_their_source():
    assert len(known_devices()) >= 15
    for name, machine in known_devices().items():
        assert machine.name == name
        assert machine.memory_bytes[machine.place] >= 4 * 10**9
        assert set(machine.peaks) == {"int8", "f16", "f32"}
        assert machine.peaks["int8"] >= machine.peaks["f16"] >= machine.peaks["f32"] >= 1e11
        assert machine.read_gb_s["disk"] < machine.read_gb_s[machine.place]
        assert len(machine.source("peaks")) > 20
        if machine.n_accelerators:
            assert machine.link_gb_s > 0
            assert machine.host_peak > 0
            assert "assumed" in machine.source("memory_bytes.host") or "nominal" in machine.source("memory_bytes.host")


def test_published_numbers():
    h100, card = parse_device("h100"), parse_device("RTX 4090")
    assert h100.read_gb_s["accelerator"] == 3350
    assert h100.peaks["f16"] == 989e12
    assert card.memory_bytes["accelerator"] == 24 << 30
    assert card.read_gb_s["accelerator"] == pytest.approx(21e9 * 384 / 8 / 1e9)


@pytest.mark.parametrize("text", ["8x h100", "8 x H100", "8xh100", "8×H100"])
def test_several_accelerators(text):
    eight = parse_device(text)
    assert eight.n_accelerators == 8
    assert eight.memory_bytes["accelerator"] == 640 * 10**9
    assert eight.read_gb_s["accelerator"] == 3350
    assert parse_device(eight.name) == eight


@pytest.mark.parametrize("text", ["", "h1000", "2x laptop-16gb", "0x h100", "2x this"])
def test_unknown_machines_are_refused(text):
    with pytest.raises(InvalidInput):
        parse_device(text)


def test_a_device_survives_json():
    for machine in (*known_devices().values(), this_machine()):
        assert device.device_from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_this_machine_without_a_probe_says_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    machine = this_machine()
    assert machine.read_gb_s["host"] == device.DEFAULT_MEMORY_GB_S
    assert machine.source("read_gb_s.host") == device.NOT_MEASURED
    assert machine.memory_bytes["host"] == device.total_memory()[0]
    assert 1 <= machine.n_cores <= machine.n_threads


def test_a_probe_of_this_machine_is_used_and_one_of_another_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    data = {"version": device.PROBE_VERSION, "machine": device.machine_id(), "date": "2026-01-02"}
    device.probe_path().write_text(json.dumps({**data, "read_gb_s_all_threads": 42.0, "disk_gb_s": 1.5}))
    machine = this_machine()
    assert (machine.read_gb_s["host"], machine.read_gb_s["disk"]) == (42.0, 1.5)
    assert machine.source("read_gb_s.host") == "measured 2026-01-02"
    assert machine.source("op_seconds") == device.NOT_MEASURED
    for other in ({"machine": "another"}, {"version": -1}):
        device.probe_path().write_text(json.dumps({**data, **other, "read_gb_s_all_threads": 42.0}))
        assert device.cached_probe() is None
    device.probe_path().write_text("{")
    assert device.cached_probe() is None


V1, V2 = "4:memory:/jobs/one\n1:cpu:/\n", "0::/user/session\n"


@pytest.mark.parametrize(
    ("files", "memberships", "limit"),
    [
        ({"memory/jobs/one/memory.limit_in_bytes": "134217728"}, V1, 134217728),
        ({"memory/jobs/memory.limit_in_bytes": "1000", "memory/jobs/one/memory.limit_in_bytes": "2000"}, V1, 1000),
        ({"user/session/memory.max": "max", "user/memory.max": "4096"}, V2, 4096),
        ({"user/session/memory.max": "max"}, V2, None),
        ({}, V1 + V2, None),
    ],
    ids=["v1", "v1 parent", "v2 parent", "v2 without", "no files"],
)
def test_the_smallest_limit_of_the_memory_cgroups(tmp_path, files, memberships, limit):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert device._cgroup_limit(tmp_path, memberships) == limit


def test_memory_is_what_the_kernel_says():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    installed = int(fields["MemTotal"].split()[0]) * 1024
    total, _ = device.total_memory()
    assert total == min(installed, device.memory_limit() or installed)
    assert 0 < device.available_memory()[0] <= total


def test_the_disk_probe_reads_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(probe, "FILE_BYTES", 4 << 20)
    result = probe.measure_disk()
    assert set(result) <= {"disk_gb_s"}  # a file system may have no direct reads
    assert all(0.001 < rate < 1000 for rate in result.values())
    assert list((tmp_path / "cache").iterdir()) == []


def test_rates_are_amounts_over_seconds(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 12.0, 13.0, 13.5, 15.0])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    # starts at 10, 12 and 13.5: takes 2, 1 and 1.5 seconds; ends once a second has passed
    assert probe._best_rate(lambda: None, 6.0, 13.0) == 6.0


def test_a_probe_is_kept_and_a_failed_measurement_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    numbers = {"compute": {"read_gb_s_all_threads": 33.0}, "kernels": {}, "disk": {}, "reserved": {"reserved_bytes": 5}}
    monkeypatch.setattr(probe, "_in_child", numbers.__getitem__)
    result = probe.probe()
    assert device.cached_probe() == result
    assert (result["read_gb_s_all_threads"], result["reserved_bytes"]) == (33.0, 5)
    assert "disk_gb_s" not in result
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]


def test_what_a_run_keeps_resident_is_measured_in_a_child():
    code = "import resource, sys; from barefoot.core import probe; print(probe._in_child('reserved')['reserved_bytes'])"
    printed = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, capture_output=True, check=True)
    reserved = int(printed.stdout)
    assert 25 << 20 < reserved < 100 << 20  # numpy alone is about 25 MiB, torch would be over 200


def test_a_child_that_dies_gives_no_numbers():
    assert probe._in_child("no such measurement") == {}
