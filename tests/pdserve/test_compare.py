from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pdserve.compare import Rule, compare, first_difference
from pdserve.openai_client import Completion, TokenLogprob
from pdserve.prompts import LENGTHS, SHARED_PREFIX, make_ids, story, suite

EXACT = Rule(exact=True)
NEAR = Rule(exact=False, tolerance=0.5)


def answer(tokens: list[int], logprobs: list[TokenLogprob] | None = None, prompt_tokens: int = 9) -> Completion:
    if logprobs is None:
        logprobs = [TokenLogprob(t, -0.1, {t: -0.1}) for t in tokens]
    return Completion(
        text=" ".join(map(str, tokens)),
        token_ids=tuple(tokens),
        prompt_token_ids=(),
        logprobs=tuple(logprobs),
        finish_reason="length",
        prompt_tokens=prompt_tokens,
        completion_tokens=len(tokens),
        cached_tokens=0,
        ttft=0.1,
        total=0.2,
        headers={},
        raw={},
    )


def chosen(token: int, logprob: float, **rivals: float) -> TokenLogprob:
    return TokenLogprob(token, logprob, {token: logprob, **{int(k[1:]): v for k, v in rivals.items()}})


def test_float32_is_exact_and_bfloat16_is_not() -> None:
    assert Rule.for_dtype("float32").exact
    assert Rule.for_dtype("torch.float32").exact
    assert not Rule.for_dtype("bfloat16").exact
    assert not Rule.for_dtype("half").exact
    assert not Rule.for_dtype("float32", payload="int8").exact
    assert Rule.for_dtype("float32", payload="fp8").tolerance > Rule.for_dtype("float32", payload="int8").tolerance
    assert Rule.for_dtype("float32", 0.1, "fp8").tolerance == 0.1


def test_exact_rule_wants_every_token() -> None:
    assert compare(answer([1, 2, 3]), answer([1, 2, 3]), EXACT).same
    result = compare(answer([1, 2, 3]), answer([1, 2, 4]), EXACT)
    assert not result.same
    assert result.parted == 2
    assert "token 2: 3 there, 4 here" in result.reason


def test_a_shorter_answer_differs() -> None:
    assert compare(answer([1, 2]), answer([1, 2, 3]), EXACT).reason == "token 2: the end there, 3 here"
    assert not compare(answer([1, 2]), answer([1, 2, 3]), NEAR).same


def test_another_prompt_length_differs_even_with_equal_tokens() -> None:
    assert not compare(answer([1], prompt_tokens=9), answer([1], prompt_tokens=8), EXACT).same


def test_an_answer_without_token_ids_proves_nothing() -> None:
    assert not compare(answer([]), answer([]), EXACT).same
    assert not compare(answer([1], []), answer([1], []), NEAR).same


def test_near_tie_is_allowed_within_the_tolerance_only() -> None:
    a = answer([7, 1], [chosen(7, -0.2), chosen(1, -1.0, t2=-1.2)])
    b = answer([7, 2], [chosen(7, -0.3), chosen(2, -1.05, t1=-1.1)])
    result = compare(a, b, NEAR)
    assert result.same
    assert not result.tokens_equal
    assert result.parted == 1
    clear = answer([7, 2], [chosen(7, -0.3), chosen(2, -0.2, t1=-1.9)])
    assert "no near tie" in compare(a, clear, NEAR).reason
    unknown = answer([7, 9], [chosen(7, -0.3), chosen(9, -1.0, t1=-1.1)])
    assert not compare(a, unknown, NEAR).same


def test_equal_tokens_with_other_probabilities_differ_in_bfloat16() -> None:
    a, b = answer([7], [chosen(7, -0.2)]), answer([7], [chosen(7, -1.4)])
    assert not compare(a, b, NEAR).same
    assert compare(a, b, EXACT).same


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_first_difference_is_the_length_of_the_common_prefix(a: list[int], b: list[int]) -> None:
    at = first_difference(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at]
        assert a[at : at + 1] != b[at : at + 1]


def fake_tokenize(text: str) -> list[int]:
    return [sum(map(ord, word)) for word in text.split()]


def test_the_suite_repeats_with_its_seed_and_differs_with_another() -> None:
    assert suite(5, fake_tokenize) == suite(5, fake_tokenize)
    assert suite(5, fake_tokenize) != suite(6, fake_tokenize)


def test_the_suite_has_every_length_and_a_shared_prefix() -> None:
    cases = suite(1, fake_tokenize)
    assert [len(c.ids or ()) for c in cases[: len(LENGTHS)]] == list(LENGTHS)
    a, b = (c for c in cases if c.name.startswith("shared"))
    assert a.ids
    assert b.ids
    assert a.ids[:SHARED_PREFIX] == b.ids[:SHARED_PREFIX]
    assert a.ids[SHARED_PREFIX:] != b.ids[SHARED_PREFIX:]
    assert max(len(c.ids or ()) for c in suite(1, fake_tokenize, max_prompt=600)) == 513


@given(st.integers(1, 400), st.integers(0, 2**32))
def test_prompts_are_exact_in_tokens(count: int, seed: int) -> None:
    assert len(make_ids(random.Random(seed), fake_tokenize, count)) == count
    assert len(story(random.Random(seed), count).split()) >= min(count, 1)
