"""12,000 damaged headers: each parses or raises one clear error, within memory bounded by the file's size."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from craft import gguf_file, pair, safetensors_file, tensor, text

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io.files import HEADER_ALLOWANCE_BYTES, WINDOW_BYTES
from barefoot.io.gguf import read_gguf
from barefoot.io.safetensors import read_safetensors

N_EACH = 6000
SEED = 20240229
# Beyond twice the file: what the readers state (1 MiB), one window, and the interpreter's own small objects.
CONSTANT_BYTES = HEADER_ALLOWANCE_BYTES + WINDOW_BYTES + 64 * 1024
EXTREME = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def base_gguf() -> bytes:
    strings = struct.pack("<IQ", 8, 40) + b"".join(text(f"token{i}") for i in range(40))
    floats = struct.pack("<IQ40f", 6, 40, *range(40))
    nested = struct.pack("<IQ", 9, 2) + 2 * struct.pack("<IQ3H", 2, 3, 1, 2, 3)
    pairs = [
        pair("general.architecture", 8, text("llama")),
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("tokenizer.ggml.tokens", 9, strings),
        pair("tokenizer.ggml.scores", 9, floats),
        pair("nested", 9, nested),
        pair("flag", 7, b"\1"),
    ]
    tensors = [tensor("a", (64, 4), 2, 0), tensor("b", (32,), 0, 160), tensor("c", (2, 3, 4), 1, 288)]
    return gguf_file(pairs, tensors, bytes(288 + 64))


def base_safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
        "b": {"dtype": "BF16", "shape": [16], "data_offsets": [128, 160]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [160, 168]},
    }
    return safetensors_file(header, bytes(168))


def flip_bits(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 9)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def extreme_field(raw: bytearray, rng: random.Random) -> None:
    form = rng.choice(("<I", "<Q"))
    at = rng.randrange(len(raw) - 8)
    struct.pack_into(form, raw, at, rng.choice(EXTREME) & ((1 << 8 * struct.calcsize(form)) - 1))


def repeat_part(raw: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(raw))
    end = min(len(raw), begin + rng.randrange(1, 200))
    raw[begin:begin] = raw[begin:end] * rng.randrange(1, 40)


def remove_part(raw: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(raw))
    del raw[begin : begin + rng.randrange(1, 64)]


def new_digit(raw: bytearray, rng: random.Random) -> None:
    digits = [i for i, byte in enumerate(raw) if 0x30 <= byte <= 0x39] or [0]
    at = rng.choice(digits)
    raw[at : at + 1] = rng.choice((b"0", b"9", b"-1", b"1e9", b"9" * 30, b"[", b'"', b"NaN", b"9" * 6000))


def other_punctuation(raw: bytearray, rng: random.Random) -> None:
    marks = [i for i, byte in enumerate(raw) if byte in b'{}[],:"'] or [0]
    at = rng.choice(marks)
    raw[at : at + 1] = rng.choice((b"[" * 5000, b"{", b"}", b"]", b"", b'"', b"[],", b"\\", b",0" * 500))


Mutation = Callable[[bytearray, random.Random], None]
BINARY: tuple[Mutation, ...] = (flip_bits, truncate, extreme_field, repeat_part, remove_part)
TEXT: tuple[Mutation, ...] = (*BINARY, new_digit, other_punctuation)


def outcome(read: Callable[[Path], object], path: Path) -> str:
    try:
        read(path)
    except (CorruptFile, UnsupportedFormat) as error:
        if path.name not in str(error) and "tensor" not in str(error):
            return f"an error that does not say where: {error}"
        return type(error).__name__
    return "parsed"


def fix_header_length(raw: bytearray) -> None:
    """Half of the damaged JSON headers state their new length truly, so that the damage reaches the parser."""
    raw[:8] = struct.pack("<Q", max(len(raw) - 8 - 168, 0))


@pytest.mark.parametrize(
    ("read", "base", "mutations"), [(read_gguf, base_gguf(), BINARY), (read_safetensors, base_safetensors(), TEXT)]
)
def test_damaged_headers(tmp_path: Path, read: Callable[[Path], object], base: bytes, mutations: tuple[Mutation, ...]):
    rng = random.Random(SEED)
    path = tmp_path / "damaged"
    path.write_bytes(base)
    assert outcome(read, path) == "parsed"
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for _ in range(N_EACH):
            raw = bytearray(base)
            for mutate in rng.choices(mutations, k=rng.randrange(1, 3)):
                if len(raw) > 16:
                    mutate(raw, rng)
            if read is read_safetensors and len(raw) > 8 and rng.random() < 0.5:
                fix_header_length(raw)
            path.write_bytes(raw)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            outcomes[outcome(read, path)] += 1
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= 2 * len(raw) + CONSTANT_BYTES, f"{peak} bytes for a file of {len(raw)}"
    finally:
        tracemalloc.stop()
    assert outcomes.total() == N_EACH
    # The damage is neither always fatal nor mostly harmless, so both ends of the readers were walked.
    assert outcomes["CorruptFile"] > N_EACH // 3
    assert outcomes["parsed"] > N_EACH // 100
    assert outcomes["UnsupportedFormat"] > 0


def many_pairs(n: int) -> bytes:
    return gguf_file([pair(f"{i:x}", 0, b"\0") for i in range(n)], [], b"")


def many_tensors(n: int) -> bytes:
    key = pair("general.alignment", 4, struct.pack("<I", 1))
    return gguf_file([key], [tensor(f"{i:x}", (1,), 24, i) for i in range(n)], bytes(n), alignment=1)


def json_tensors(n: int) -> bytes:
    row = {"dtype": "I8", "shape": [1]}
    return safetensors_file({f"{i:x}": row | {"data_offsets": [i, i + 1]} for i in range(n)}, bytes(n))


AMPLIFIERS = {
    "pairs": (read_gguf, many_pairs(200_000)),
    "tensors": (read_gguf, many_tensors(60_000)),
    "wide text": (read_gguf, gguf_file([pair("k", 8, text("a" * 4_000_000 + "😀"))], [], b"")),
    "wide texts": (read_gguf, gguf_file([pair(f"{i}", 8, text("a" * 40_000 + "😀")) for i in range(100)], [], b"")),
    "long text": (read_gguf, gguf_file([pair("k", 8, text("a" * 4_000_000))], [], b"")),
    "strings": (read_gguf, gguf_file([pair("k", 9, struct.pack("<IQ", 8, 500_000) + bytes(4_000_000))], [], b"")),
    "arrays": (
        read_gguf,
        gguf_file([pair("k", 9, struct.pack("<IQ", 9, 100_000) + struct.pack("<IQ", 0, 0) * 100_000)], [], b""),
    ),
    "empty lists": (read_safetensors, safetensors_file(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", b"")),
    "numbers": (read_safetensors, safetensors_file(b'{"a":[' + b"7777," * 1_000_000 + b"7]}", b"")),
    "objects": (read_safetensors, safetensors_file(b'{"a":[' + b'{"":0},' * 500_000 + b"{}]}", b"")),
    "wide header": (read_safetensors, safetensors_file(b'{"a":"' + "😀".encode() + b"a" * 4_000_000 + b'"}', b"")),
    "long header": (read_safetensors, safetensors_file(b'{"a":"' + b"a" * 4_000_000 + b'"}', b"")),
    "json tensors": (read_safetensors, json_tensors(20_000)),
}


@pytest.mark.parametrize("what", AMPLIFIERS)
def test_small_bytes_do_not_become_large_objects(tmp_path: Path, what: str):
    read, raw = AMPLIFIERS[what]
    path = tmp_path / "amplifier"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        result = outcome(read, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * len(raw) + CONSTANT_BYTES, f"{what}: {result}, {peak} bytes for a file of {len(raw)}"


@pytest.mark.parametrize(("read", "make"), [(read_gguf, many_tensors), (read_safetensors, json_tensors)])
def test_ordinary_counts_are_not_refused(tmp_path: Path, read: Callable[[Path], object], make: Callable[[int], bytes]):
    """Small files with as many tensors as a model of 50 layers are within the allowance; larger ones bring data."""
    path = tmp_path / "small"
    path.write_bytes(make(600))
    assert len(read(path).tensors) == 600  # type: ignore[attr-defined]
