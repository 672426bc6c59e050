from __future__ import annotations

import random

import pytest

from pdserve import marks


def ids(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(150_000) for _ in range(count)]


@pytest.mark.parametrize("at", [0, 1, 255, 256, 1234, 2999])
def test_the_first_different_token_is_found(at: int) -> None:
    one, other = ids(3000), ids(3000)
    other[at] += 1
    a, b = (marks.make(tokens, 256, 7) for tokens in (one, other))
    assert marks.common(a[0], b[0]) == at
    equal = [a[1][i : i + 8] == b[1][i : i + 8] for i in range(0, len(a[1]), 8)]
    assert equal == [n < at // 256 for n in range(11)]


def test_a_prompt_that_goes_on_is_equal_as_far_as_the_shorter_one_goes() -> None:
    tokens = ids(700)
    a, b = marks.make(tokens, 256, 7), marks.make(tokens[:300], 256, 7)
    assert marks.common(a[0], b[0]) == 300
    assert a[1].startswith(b[1])
    assert len(b[1]) == 8


def test_swapped_tokens_are_different() -> None:
    assert marks.common(marks.make([5, 9, 9, 5], 4, 1)[0], marks.make([5, 9, 5, 9], 4, 1)[0]) == 2
    assert marks.make([], 4, 1) == (b"", b"")


def test_marks_of_another_daemon_mean_nothing() -> None:
    tokens = ids(500)
    a, b = (marks.make(tokens, 256, marks.seed(name))[0] for name in ("one", "two"))
    assert marks.common(a, b) == 0


def test_images_differ_though_their_tokens_do_not() -> None:
    tokens = [3] * 100
    a, b, c = (marks.make(tokens, 50, 1, [(name, 40, 20)])[0] for name in ("cat", "dog", "cat"))
    assert (marks.common(a, b), marks.common(a, c)) == (40, 100)


def test_only_so_many_tokens_get_marks() -> None:
    made, edges = marks.make(ids(1000), 256, 1, most=600)
    assert (len(made), len(edges)) == (1200, 16)
