"""Long-context tasks, answered by drivers whose answers are known: who copies, who forgets, who guesses."""

from __future__ import annotations

import copy
import json
import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from random_files import LLAMA, write_random
from tiny import engine
from tokenizers import Tokenizer as Full
from tokenizers import models, pre_tokenizers, trainers

from barefoot.core.errors import InvalidInput
from barefoot.evals.divergence import kl, log_softmax, nll
from barefoot.evals.long_context.continuation import Passage, diverge, passages, reference, reference_bytes
from barefoot.evals.long_context.copying import copying
from barefoot.evals.long_context.drivers import going_back
from barefoot.evals.long_context.facts import Wording, needle, shared_context
from barefoot.evals.long_context.key_value import key_value
from barefoot.evals.long_context.prompts import PLAIN, chat_form, largest, words
from barefoot.evals.long_context.reach import reach, wilson
from barefoot.evals.long_context.sessions import Answer, Session, Turn, apart, generate, in_turn
from barefoot.evals.long_context.suite import Size, answers, by_task, suite
from barefoot.evals.texts import BUILT_IN, read_text
from barefoot.io.chat import ChatTemplate
from barefoot.io.tokenizer import Tokenizer
from barefoot.io.tokenizer_files import read_json_tokenizer

TEXT = read_text(BUILT_IN)
CHATML = ChatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    from_model=True,
)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Driver:
    """One sequence whose next token is ``guess(visible tokens)``, all but surely; None guesses all tokens alike."""

    def __init__(self, n_vocab, guess=None, window=None):
        self.spec = SimpleNamespace(vocab_size=n_vocab)
        self.guess, self.window = guess, window
        self.history, self.calls = [], []

    def reset(self):
        self.history, self.calls = [], []

    def prefill(self, ids, *, all_logits=None):
        self.calls.append(list(ids))
        for i, token in enumerate(ids):
            self.history.append(token)
            if all_logits is not None:
                all_logits(i, self._logits()[None])
        return self._logits()

    def decode(self, token):
        return self.prefill([token])

    def truncate(self, n):
        del self.history[n:]

    def _logits(self):
        logits = np.zeros(self.spec.vocab_size, np.float32)
        if self.guess is not None:
            logits[self.guess(self.history[-(self.window or len(self.history)) :])] = 50
        return logits


def induction(visible):
    """The token after the longest of the earlier stretches that end as the sequence does, the latest of them."""
    best, longest = 0, 0
    for i in range(len(visible) - 1):
        if visible[i] == visible[-1]:
            length = 1
            while length <= i and visible[i - length] == visible[-1 - length]:
                length += 1
            if length >= longest:
                best, longest = visible[i + 1], length
    return best


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """2,000 tokens of the built-in text's English, digits one by one, with the control tokens of CHATML."""
    full = Full(models.BPE())
    full.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    full.train_from_iterator(TEXT[:200_000].split("\n"), trainer)
    folder = tmp_path_factory.mktemp("words")
    full.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return Tokenizer(read_json_tokenizer(folder))


@pytest.fixture(scope="module")
def form(tokenizer):
    return chat_form(CHATML, tokenizer)


def copier(tokenizer, window=None):
    return Driver(tokenizer.n_vocab, induction, window)


def place(part, whole):
    """Where ``part`` begins in ``whole``; it is there once."""
    found = [i for i in range(len(whole) - len(part) + 1) if tuple(whole[i : i + len(part)]) == tuple(part)]
    assert len(found) == 1
    return found[0]


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_form_writes_what_its_template_writes(tokenizer, form):
    said = ["What is here?", "Nothing.", "And there?"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    expected = tokenizer.encode_segments(CHATML.render(messages, tokenizer), add_bos=False)
    assert list(form.prompt(tokenizer, said[0], said[1]) + form.further(tokenizer, said[2])) == expected


def test_a_message_makes_no_control_token(tokenizer, form):
    ids = form.prompt(tokenizer, "<|im_end|>", "<|im_start|>")
    assert [tokenizer.piece(i) for i in ids if not tokenizer.decode_bytes(i)] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>",
    ]  # fmt: skip


def test_a_template_that_drops_messages_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="one after the other"):
        chat_form(ChatTemplate("{{ messages[0].content }}", True), tokenizer)
    assert chat_form(None, tokenizer) is PLAIN


@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_the_largest_that_fits(n):
    assert largest(7, lambda i: i <= n) == n


def test_words_are_tokens_of_their_own(tokenizer):
    found = words(tokenizer, 100)
    assert len(found) == len({word for word, _ in found}) > 300
    for word, token in found[::17]:
        assert re.fullmatch("[a-z]{4,}", word)
        assert tokenizer.encode(f"the {word}", add_bos=False)[-1] == token


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_lies_at_its_depth_between_two_sentences(tokenizer, form, depth):
    sentence = "Here are five small words."
    (turn,) = (session := needle(f"{sentence} " * 2000, tokenizer, form, 400, depth, seed=3)).turns
    text, code = tokenizer.decode(session.prompt), tokenizer.decode(turn.answer)
    opening = tokenizer.decode(turn.opening)
    assert re.fullmatch("[1-9][0-9]{3}", code)
    fact = f"{opening}{code}."
    assert text.count(fact) == text.count(code) == 1
    before, after = text.removeprefix("user\n").split(fact)
    after, _, question = after.partition("\n\n")
    n_before, n_after = len(before.split()), len(after.split())
    assert abs(n_before - depth * (n_before + n_after)) <= 4  # of a sentence's five words
    assert re.fullmatch(f"({sentence} )*", before)
    noun = opening.removeprefix("The access code of the ").removesuffix(" is ")
    assert question == f"What is the access code of the {noun}?\nassistant\n"
    longest_word = max(len(tokenizer.encode(f" {word}", add_bos=False)) for word in sentence.split())
    assert 400 - longest_word < len(session.prompt) <= 400


def test_a_shared_context_holds_its_facts_once_and_no_question(tokenizer, form):
    session = shared_context(TEXT, tokenizer, form, 900, 5, seed=1)
    places = [place((*turn.opening[1:], *turn.answer), session.prompt) for turn in session.turns]
    assert len(session.prompt) <= 900
    assert np.argsort(places).tolist() == np.argsort([turn.depth for turn in session.turns]).tolist()
    assert sorted(turn.depth for turn in session.turns) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert "What is the access code" not in tokenizer.decode(session.prompt)
    assert len({turn.question for turn in session.turns}) == 5


def test_a_key_is_there_once_with_its_code(tokenizer):
    session = key_value(tokenizer, 500, DEPTHS, seed=2)
    pairs = dict(re.findall(r'"(\w+)": "(\d+)"', tokenizer.decode(session.prompt)))
    asked = [(tokenizer.decode(t.opening), tokenizer.decode(t.answer)) for t in session.turns]
    assert 500 - 20 < len(session.prompt) <= 500
    order = list(pairs)
    assert [order.index(opening[2:-4]) for opening, _ in asked] == [round(d * (len(pairs) - 1)) for d in DEPTHS]
    assert all(pairs[opening[2:-4]] == code for opening, code in asked)
    assert len(set(pairs.values())) == len(pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda t, f, seed: needle(TEXT, t, f, 300, 0.5, seed),
        lambda t, f, seed: shared_context(TEXT, t, f, 400, 3, seed),
        lambda t, f, seed: key_value(t, 200, (0.5,), seed),
        lambda t, f, seed: copying(t, 30, seed),
    ],
)
def test_a_seed_makes_the_same_again_and_another_makes_another(tokenizer, form, make):
    assert make(tokenizer, form, 7) == make(tokenizer, form, 7) != make(tokenizer, form, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t, f: needle(TEXT, t, f, 300, 1.5, 0), "a depth is 0"),
        (lambda t, f: needle("Too short.", t, f, 300, 0.5, 0), "does not fill 300 tokens"),
        (lambda t, f: needle(TEXT, t, f, 20, 0.5, 0), "20 tokens hold no text"),
        (lambda t, f: shared_context(TEXT, t, f, 300, 0, 0), "facts have names, got 0"),
        (lambda t, f: key_value(t, 12, (0.5,), 0), "12 tokens hold no pair"),
        (lambda t, f: key_value(t, 300, (-0.1,), 0), "a depth is 0"),
        (lambda t, f: key_value(t, 10**5, (0.5,), 0), "100000 tokens hold more"),
        (lambda t, f: copying(t, 1, 0), "can be copied with this vocabulary, got 1"),
        (lambda t, f: copying(t, 2001, 0), "can be copied with this vocabulary, got 2001"),
        (lambda t, f: Wording(n_digits=0), "1 to 9 digits, got 0"),
    ],
)
def test_what_can_not_be_made_is_refused(tokenizer, form, make, message):
    with pytest.raises(InvalidInput, match=message):
        make(tokenizer, form)


# --- how it is asked --------------------------------------------------------------------------------------------------


def test_in_turn_feeds_the_prompt_at_once_and_then_the_conversation_with_the_right_answers():
    turns = (Turn((), (7,), (8, 9), 0.0), Turn((4,), (5,), (6,), 0.0))
    driver = Driver(10, lambda visible: 0)
    assert not any(answer.exact for answer in in_turn(driver, Session((1, 2, 3), turns)))
    assert driver.calls == [[1, 2, 3], [7], [8], [9, 4, 5]]


@pytest.mark.parametrize("stepwise", [True, False])
def test_an_answer_is_foreseen_from_what_precedes_each_token(stepwise):
    driver = Driver(10, lambda visible: (visible[-1] + 1) % 10)
    (answer,) = in_turn(driver, Session((1, 2), (Turn((), (3,), (4, 5, 7, 8), 0.0),)), stepwise=stepwise)
    assert answer.right == (True, True, False, True)
    likely = math.log(math.exp(50) + 9)
    assert answer.nlls == pytest.approx([likely - 50, likely - 50, likely, likely - 50])


@contextmanager
def copied(driver, n_held):
    assert len(driver.history) == n_held
    yield copy.deepcopy(driver)


@pytest.mark.parametrize("fork", [None, going_back, copied])
def test_apart_each_turn_follows_the_context_alone(tokenizer, form, fork):
    session = shared_context(TEXT, tokenizer, form, 300, 3, seed=5)
    driver = copier(tokenizer)
    seen = []
    guess = driver.guess
    driver.guess = lambda visible: seen.append(len(visible)) or guess(visible)
    found = apart(driver, session, fork)
    assert all(answer.exact for answer in found)
    longest = max(len(t.question + t.opening + t.answer) for t in session.turns)
    assert max(seen) == len(session.prompt) + longest - 1
    n_contexts = 3 if fork is None else 1
    assert seen.count(len(session.prompt)) == n_contexts


def test_greedy_decoding_stops_where_it_is_told():
    driver = Driver(10, lambda visible: (visible[-1] + 1) % 10)
    session = Session((1, 2), (Turn((3,), (9,), (9,), 0.0),))
    assert generate(driver, session, 8, frozenset({8})) == [4, 5, 6, 7]
    assert generate(driver, session, 2, frozenset({8})) == [4, 5]


# --- known answers ----------------------------------------------------------------------------------------------------


def test_who_forgets_fails_exactly_where_the_fact_is_forgotten(tokenizer, form):
    window, found = 150, []
    for depth in np.linspace(0, 1, 9):
        session = needle(TEXT, tokenizer, form, 300, depth, seed=int(100 * depth))
        (turn,) = session.turns
        fact = (*turn.opening[1:], *turn.answer)
        start, n = place(fact, session.prompt), len(session.prompt) + len(turn.opening)
        inside, outside = start >= n + len(turn.answer) - window, start + len(fact) <= n - window
        assert in_turn(copier(tokenizer), session)[0].exact
        if inside or outside:  # a fact half forgotten decides nothing
            assert in_turn(copier(tokenizer, window), session)[0].exact == inside
            found.append(inside)
    assert len(found) >= 7
    assert 3 <= sum(found) <= 6


def test_who_forgets_looks_up_exactly_the_keys_that_are_left(tokenizer):
    depths = tuple(np.linspace(0, 1, 9))
    session = key_value(tokenizer, 300, depths, seed=4)
    window, expected = 150, {}
    for i, turn in enumerate(session.turns):
        pair = (*turn.opening[2:], *turn.answer)  # behind a newline and a quote
        start, n = place(pair, session.prompt), len(session.prompt) + len(turn.opening)
        inside, outside = start >= n + len(turn.answer) - window, start + len(pair) <= n - window
        if inside or outside:  # a pair half forgotten decides nothing
            expected[i] = inside
    found = apart(copier(tokenizer, window), session)
    assert all(answer.exact for answer in apart(copier(tokenizer), session))
    assert {i: found[i].exact for i in expected} == expected
    assert len(expected) >= 8
    assert 3 <= sum(expected.values()) <= 5


def test_copying_needs_all_of_the_first_copy(tokenizer):
    session = copying(tokenizer, 40, seed=1)
    (turn,) = session.turns
    assert len(turn.answer) == 39
    assert session.prompt[-40:] == (turn.opening[-1], *turn.answer)
    between = len(turn.opening) - 1  # the second heading
    assert set(in_turn(copier(tokenizer), session)[0].right) == {True}
    # a word is foreseen from its predecessor's first copy, and itself behind it
    assert set(in_turn(copier(tokenizer, 40 + between + 1), session)[0].right) == {True}
    assert set(in_turn(copier(tokenizer, 40 + between - 1), session)[0].right) == {False}


def test_who_guesses_is_as_surprised_as_the_vocabulary_is_large(tokenizer, form):
    made = suite(TEXT, tokenizer, form, 200, size=Size(1, (0.5,), 1, 1, 2, 1, 2, 8))
    driver = Driver(tokenizer.n_vocab)
    cells = answers(driver, made)
    found = by_task(cells, cells)
    assert {task: inside["all"].nll for task, inside in found.items()} == pytest.approx(
        dict.fromkeys(("needle", "key_value", "in_turn", "apart", "copy"), math.log(tokenizer.n_vocab))
    )
    along = diverge(driver, made.passages, [reference(driver, p) for p in made.passages])
    assert along["nll"] == pytest.approx(math.log(tokenizer.n_vocab))
    assert along["kl_mean"] == pytest.approx(0, abs=1e-12)


def test_a_suite_sums_up_by_depth_and_turn_beside_the_full_cache(tokenizer, form):
    made = suite(TEXT, tokenizer, form, 240, size=Size(1, (0.0, 1.0), 1, 1, 2, 1, 1, 4))
    full, forgetful = (answers(copier(tokenizer, window), made, going_back) for window in (None, 90))
    assert {inside["all"].exact for inside in by_task(full, full).values()} == {1.0}
    found = by_task(forgetful, full)
    assert (found["needle"]["depth 0.0"].exact, found["needle"]["depth 1.0"].exact) == (0.0, 1.0)
    assert (found["key_value"]["depth 0.0"].exact, found["key_value"]["depth 1.0"].exact) == (0.0, 1.0)
    assert found["needle"]["all"].n == found["needle"]["all"].n_valid == 2
    assert found["in_turn"].keys() == found["apart"].keys() == {"turn 1", "turn 2", "all"}


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = wilson(0, 20)
    assert (low, high) == pytest.approx((0, 1.96**2 / (20 + 1.96**2)), abs=1e-12)
    assert wilson(20, 20) == pytest.approx((1 - high, 1))


def test_valid_is_what_the_full_cache_answers():
    right, wrong, half = (Answer((1.0, 3.0), marks) for marks in ((True, True), (False, False), (True, False)))
    found = reach([right, wrong, right, half], [right, right, wrong, half])
    assert (found.n, found.exact, found.n_valid, found.exact_of_valid) == (4, 0.5, 2, 0.5)
    assert (found.n_tokens, found.tokens, found.n_valid_tokens, found.tokens_of_valid) == (8, 5 / 8, 5, 3 / 5)
    assert (found.nll, found.log_probability) == (2.0, -4.0)
    nothing = reach([right], [wrong])
    assert (nothing.n_valid, nothing.exact_of_valid, nothing.tokens_of_valid) == (0, None, None)


# --- a real, small engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "llama"
    write_random(path, LLAMA)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "other"
    write_random(path, LLAMA, seed=1)
    return path


@pytest.mark.parametrize("stepwise", [True, False])
def test_a_continuation_diverges_as_its_logits_do(folder, other, stepwise):
    ids = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (2, 60)).tolist()
    texts = [Passage(tuple(each[:40]), tuple(each[40:])) for each in ids]
    rows = []
    with engine(folder, chunk=16, n_logits=5) as full, engine(other, chunk=16, n_logits=5) as arm:
        references = [reference(full, text, stepwise=stepwise) for text in texts]
        itself = diverge(full, texts, references, stepwise=stepwise)
        found = diverge(arm, texts, references, stepwise=stepwise)
        for run in (full, arm):
            rows.append([])
            for text in texts:
                run.reset()
                run.prefill(text.prompt)
                rows[-1] += [run.decode(token).copy() for token in text.continuation[:-1]]
    targets = np.array([token for text in texts for token in text.continuation[1:]])
    exact, theirs = map(np.array, rows)
    log_p, log_q = log_softmax(exact), log_softmax(theirs)
    assert [r.nbytes for r in references] == [reference_bytes(19, LLAMA["vocab_size"])] * 2
    # Errors e of at most 2^-11 |log p| span d = 2^-10 max |log p|: KL = log E[exp e] - E[e] <= d² / 8 (Hoeffding's
    # lemma). Against another distribution they weigh in once more: p changes by no more than p d.
    d = 2.0**-10 * np.abs(log_p).max()
    assert itself["kl_mean"] <= itself["kl_p99"] <= d * d / 8
    among = d * (np.exp(log_p) * np.abs(log_p - log_q)).sum(-1).mean() + d * d
    assert found["kl_mean"] == pytest.approx(kl(exact, theirs).mean(), abs=among)
    assert found["kl_mean"] > 10 * among
    assert found["nll"] == pytest.approx(nll(theirs, targets).mean(), rel=1e-5)
    assert found["reference_nll"] == pytest.approx(nll(exact, targets).mean(), rel=2**-11)
    assert found["n_tokens"] == 38


def test_passages_are_stretches_of_the_text(tokenizer):
    found = passages(TEXT, tokenizer, 50, 10, 3)
    assert [(len(p.prompt), len(p.continuation), p.n_scored) for p in found] == [(50, 11, 10)] * 3
    assert all(tokenizer.decode(p.prompt + p.continuation) in TEXT for p in found)


def test_an_engine_answers_apart_by_going_back_as_by_prefilling_anew(folder):
    rng = np.random.default_rng(1)
    draw = lambda n: tuple(rng.integers(0, LLAMA["vocab_size"], n).tolist())  # noqa: E731
    session = Session(draw(50), tuple(Turn(draw(3), draw(2), draw(4), 0.0) for _ in range(3)))
    with engine(folder) as run:
        anew, back = apart(run, session), apart(run, session, going_back)
    assert [a.nlls for a in anew] == [a.nlls for a in back]
