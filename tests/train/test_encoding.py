"""Which tokens are learned, held to masks that are spelled out turn by turn and byte by byte."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.io.chat import ChatTemplate
from barefoot.io.tokenizer import Tokenizer
from barefoot.train import NOTHING
from barefoot.train.encoding import Document, Encoder, beginning
from barefoot.train.formats import Completion, Conversation, Message, Text

START, END, HE = 256, 257, 258  # ids of the tiny vocabulary


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One id for each byte, but for "he"; the vocabulary numbers bytes in an order of its own."""
    of_byte = {tokenizer.decode_bytes(i): i for i in range(256)}
    found: list[int] = []
    for byte in text.encode():
        if found and found[-1] == of_byte[b"h"] and byte == ord("e"):
            found[-1] = HE
        else:
            found.append(of_byte[bytes([byte])])
    return found


def spelled(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The turns of the tiny model's template, and what is learned of them, without the template."""
    ids: list[int] = []
    learned: list[bool] = []
    for message in messages:
        answer = message["role"] == "assistant"
        parts = [
            ([START], False),
            (byte_ids(tokenizer, message["role"] + "\n"), False),
            (byte_ids(tokenizer, message["content"]), answer),
            ([END], answer),
            (byte_ids(tokenizer, "\n"), False),
        ]
        for part, is_learned in parts:
            ids += part
            learned += [is_learned] * len(part)
    return ids, learned


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def check(document: Document, ids: list[int], learned: list[bool]) -> None:
    assert document.ids.tolist() == ids
    assert document.learned.tolist() == learned
    labels = [ids[i + 1] if i + 1 < len(ids) and learned[i + 1] else NOTHING for i in range(len(ids))]
    assert document.labels().tolist() == labels


def test_answers_of_conversations(encoder: Encoder, tokenizer: Tokenizer):
    rng = random.Random(3)
    words = ["he", "h", "hello", "grüße", "\n", " ", "😀", "<|im_end|>", "<|im_start|>assistant\n", "", "the end"]
    for _ in range(60):
        contents = ["".join(rng.choices(words, k=rng.randrange(4))) for _ in range(rng.randrange(2, 7))]
        messages = turns(*contents)
        if rng.random() < 0.3:
            messages = [{"role": "system", "content": "be brief"}, *messages]
        ids, learned = spelled(tokenizer, messages)
        document = encoder.encode(Conversation(messages))
        check(document, ids[:256], learned[:256])
        assert document.is_cut == (len(ids) > 256)


def test_all_tokens_but_the_first_may_be_learned(tokenizer: Tokenizer, template: ChatTemplate):
    messages = turns("hi", "hello")
    ids, _ = spelled(tokenizer, messages)
    document = Encoder(tokenizer, template, 256, "all").encode(Conversation(messages))
    check(document, ids, [False] + [True] * (len(ids) - 1))
    assert document.n_learned == len(ids) - 1


def test_a_long_conversation_loses_its_end(tokenizer: Tokenizer, template: ChatTemplate):
    messages = turns("x" * 40, "y" * 200, "z" * 5000, "never")
    ids, learned = spelled(tokenizer, messages)
    document = Encoder(tokenizer, template, 100).encode(Conversation(messages))
    check(document, ids[:100], learned[:100])
    assert document.is_cut
    behind = Encoder(tokenizer, template, 32).encode(Conversation(messages))
    assert behind.n_learned == 0, "the first answer begins behind its end"


def test_a_prompt_that_merges_with_its_completion(tokenizer: Tokenizer):
    """The token of both is learned, and the token that ends a text."""
    document = Encoder(tokenizer, None, 64).encode(Completion("oh, h", "ey"))
    check(document, [*byte_ids(tokenizer, "oh, hey"), END], [False] * 4 + [True] * 3)


@pytest.mark.parametrize("between", ["", "\n\n"])
def test_completions_as_they_stand(tokenizer: Tokenizer, between: str):
    document = Encoder(tokenizer, None, 64).encode(Completion("ask", "tell", between))
    n = len("ask" + between)
    check(document, [*byte_ids(tokenizer, f"ask{between}tell"), END], [False] * n + [True] * 5)


def test_completions_where_there_is_a_template(encoder: Encoder, tokenizer: Tokenizer):
    check(encoder.encode(Completion("ask", "tell", "\n\n")), *spelled(tokenizer, turns("ask", "tell")))


def test_a_completion_that_was_cut_has_no_end(tokenizer: Tokenizer):
    document = Encoder(tokenizer, None, 16).encode(Completion("ask", "t" * 50_000))
    check(document, byte_ids(tokenizer, "ask" + "t" * 13), [False] * 3 + [True] * 13)
    assert document.is_cut


def test_texts(encoder: Encoder, tokenizer: Tokenizer):
    check(encoder.encode(Text("ab")), [*byte_ids(tokenizer, "ab"), END], [False, True, True])
    check(encoder.text("ab", ends=False), byte_ids(tokenizer, "ab"), [False, True])
    check(encoder.text("a\r\nb", ends=False), byte_ids(tokenizer, "a\nb"), [False, True, True])


BY_LAST = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
SUFFIXED = BY_LAST + "{% if add_generation_prompt %}assistant: {% else %}<|im_end|>{% endif %}"
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('###')[-1] if not loop.last else m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NUMBERED = (
    "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def learned_texts(tokenizer: Tokenizer, source: str, messages: list[Message]) -> list[str]:
    """Every run of learned tokens, with "#" for the end of a turn."""
    document = Encoder(tokenizer, ChatTemplate(source, True), 256).encode(Conversation(messages))
    bounds = np.flatnonzero(np.diff(document.learned, prepend=False, append=False)).reshape(-1, 2)
    runs = [document.ids[begin:end].tolist() for begin, end in bounds]
    return [tokenizer.decode(ids) + "#" * ids.count(END) for ids in runs]


def test_what_a_template_writes_behind_everything_is_not_part_of_an_answer(tokenizer: Tokenizer):
    assert learned_texts(tokenizer, SUFFIXED, turns("a", "b", "c", "d")) == ["b#", "d#"]


def test_turns_without_an_end_are_learned_up_to_the_next_one(tokenizer: Tokenizer):
    assert learned_texts(tokenizer, ENDLESS, turns("a", "b", "c", "d")) == ["b\n", "d\n"]


def test_templates_that_rewrite_are_refused_for_several_answers(tokenizer: Tokenizer):
    thoughtful = turns("a", "thought###b", "c", "d")
    with pytest.raises(InvalidInput, match="message 1: the model's chat template writes this answer") as caught:
        learned_texts(tokenizer, FORGETFUL, thoughtful)
    assert caught.value.cure is not None
    assert "cut the conversation behind each answer" in caught.value.cure
    assert learned_texts(tokenizer, FORGETFUL, thoughtful[:2]) == ["thought###b#"]
    assert learned_texts(tokenizer, FORGETFUL, turns("a", "b", "c", "d")) == ["b#", "d#"], "nothing to forget"
    with pytest.raises(InvalidInput, match="message 1"):
        learned_texts(tokenizer, NUMBERED, turns("a", "b", "c", "d"))
    everything = Encoder(tokenizer, ChatTemplate(FORGETFUL, True), 256, "all").encode(Conversation(thoughtful))
    assert everything.n_learned == len(everything.ids) - 1


def test_a_conversation_needs_a_template_that_takes_it(tokenizer: Tokenizer):
    with pytest.raises(InvalidInput, match="a conversation needs a chat template"):
        Encoder(tokenizer, None, 64).encode(Conversation(turns("a", "b")))
    with pytest.raises(InvalidInput, match="the chat template rejects these messages: no"):
        learned_texts(tokenizer, "{{ raise_exception('no') }}", turns("a", "b"))
    with pytest.raises(InvalidInput, match="the chat template fails"):
        learned_texts(tokenizer, "{{ messages[0].nothing.at.all }}", turns("a", "b"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("aa bb cc dd ee ff gg", "aa bb cc dd ee"),  # 15 tokens have room beside the end, and 14 end at a word
        ("aaaaaaaaaaaaaaaaaaaaaaaaa", "a" * 15),
        ("he" * 40, "he" * 15),
        ("aa bb", "aa bb"),
        ("ääääääääää", "äääääää"),
        ("a\n\n\nbbbbbbbbbbbbbbbbbbbbb", "a\n\n\n" + "b" * 11),  # no word ends in the second half
        ("", ""),
    ],
)
def test_the_longest_beginning_that_fits(tokenizer: Tokenizer, text: str, kept: str):
    encoder = Encoder(tokenizer, None, 16)
    n, ids = encoder.fit(text)
    assert text[:n] == kept
    assert encoder.window(ids, ends=True).ids.tolist() == encoder.text(kept, ends=True).ids.tolist()
    assert len(ids) + 1 <= 16


@pytest.mark.parametrize("n_bytes", range(9))
def test_the_beginning_of_a_text_has_whole_characters(n_bytes: int):
    text = "aß😀b"
    kept = beginning(text, n_bytes)
    assert text.startswith(kept)
    following = text[: len(kept) + 1]
    assert len(kept.encode()) <= n_bytes < len(following.encode()) or kept == text


def test_knobs(tokenizer: Tokenizer):
    with pytest.raises(InvalidInput, match="expected 16 or more"):
        Encoder(tokenizer, None, 15)
    with pytest.raises(InvalidInput, match="unknown part to train on 'answer'; known: all, answers"):
        Encoder(tokenizer, None, 16, "answer")  # type: ignore[arg-type]
