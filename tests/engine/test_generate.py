"""Stop strings, stop ids, reasons and counts, with an engine that recites."""

import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.engine.generate import Generation, generate, release

TEXT = "one two, three."


class Reciter:
    """An engine whose greedy answer is TEXT, a character a token, then the token 0."""

    def __init__(self, context=100):
        self.context, self.position, self.n_prompt = context, 0, 0

    @property
    def remaining(self):
        return self.context - self.position

    def _logits(self):
        at = self.position - self.n_prompt
        logits = np.zeros(128, np.float32)
        logits[ord(TEXT[at]) if at < len(TEXT) else 0] = 1
        return logits

    def prefill(self, ids, progress=None):
        self.position += len(ids)
        self.n_prompt = self.position
        return self._logits()

    def decode(self, token):
        assert token == ord(TEXT[self.position - self.n_prompt])
        self.position += 1
        return self._logits()


class Letters:
    def feed(self, token_id):
        return chr(token_id)

    def flush(self):
        return ""


def run(engine=None, **settings):
    result = Generation()
    arguments = {"max_tokens": 50, "stop_ids": (0,)} | settings
    events = list(generate(engine or Reciter(), [1, 2], Letters(), result=result, **arguments))
    assert "".join(e.text for e in events) == result.text
    assert [e.id for e in events if e.id is not None] == result.ids
    return result, events


def test_a_stop_id_ends_it_and_is_no_text():
    result, _ = run()
    assert (result.text, result.finish_reason, result.n_prompt) == (TEXT, "stop", 2)
    assert result.n_decoded == len(TEXT)
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0


def test_max_tokens():
    result, _ = run(max_tokens=5)
    assert (result.text, result.finish_reason, result.n_decoded) == ("one t", "length", 4)


def test_full_context():
    result, _ = run(Reciter(context=6))
    assert (result.text, result.finish_reason) == (TEXT[:5], "context")


def test_a_stop_string_is_held_back_until_it_is_certain():
    result, events = run(stop=(", t", "zzz"))
    assert (result.text, result.finish_reason) == ("one two", "stop")
    assert [e.text for e in events][-3:] == ["", "", ""]
    result, events = run(stop=(", x",))
    assert result.text == TEXT
    assert ", t" in [e.text for e in events]


def test_held_text_comes_out_at_the_end():
    result, events = run(stop=("..",))
    assert result.text == TEXT
    assert (events[-1].id, events[-1].text) == (None, ".")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", (), ("abc", "", False)),
        ("abSTOPcd", ("STOP",), ("ab", "", True)),
        ("abST", ("STOP",), ("ab", "ST", False)),
        ("abSTO", ("TON", "STOP"), ("ab", "STO", False)),
        ("xENDyST", ("ST", "END"), ("x", "", True)),
        ("aaa", ("aab",), ("a", "aa", False)),
    ],
)
def test_release(text, stop, expected):
    assert release(text, stop) == expected


def test_bad_arguments():
    with pytest.raises(InvalidInput, match="max_tokens must be at least 1, got 0"):
        run(max_tokens=0)
    with pytest.raises(InvalidInput, match="a stop string is empty"):
        run(stop=("",))
