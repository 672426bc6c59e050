from __future__ import annotations

import pytest

from pdserve.errors import ConfigError
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.options import parse

A, B = "http://127.0.0.1:8100", "http://127.0.0.1:8200"


def test_instances_get_names_and_roles() -> None:
    made = parse(["--prefill", A, f"big={A}", "--decode", B, "--decode", f"{B}/?a=b", "--both", f"x={B}"])
    assert made.instances == (
        ("prefill-0", "prefill", A), ("big", "prefill", A), ("decode-0", "decode", B),
        ("decode-1", "decode", f"{B}/?a=b"), ("x", "both", B),
    )  # fmt: skip


def test_the_rest() -> None:
    made = parse(["--decode", B, "--model", "m", "--model", "n", "--prefill-timeout", "7", "--max-body-mib", "2"])
    assert made.models == {"m", "n"}
    assert made.deadlines == Deadlines(prefill=7)
    assert made.max_body == 2 * 1024 * 1024
    assert (made.prefill_policy, made.decode_policy) == ("round_robin", "round_robin")


def test_caches_have_names_like_instances() -> None:
    made = parse(["--decode", B, "--cache", "http://10.0.0.1:8080/", "far=http://10.0.0.2:8080", "http://10.0.0.3:1"])
    assert made.caches == (
        ("cache", "http://10.0.0.1:8080"),
        ("far", "http://10.0.0.2:8080"),
        ("cache-2", "http://10.0.0.3:1"),
    )
    assert parse(["--decode", B]).caches == ()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--decode: no engine is given"),
        (["--prefill", A], "--decode: no engine is given"),
        (["--decode", f"a={A}", f"a={B}"], "'a' is used twice"),
        (["--decode", A, "--prefill-timeout", "0"], "--prefill-timeout: 0 is not a positive"),
        (["--decode", A, "--event-timeout", "nan"], "--event-timeout: nan is not a positive"),
        (["--decode", A, "--max-body-mib", "-1"], "--max-body-mib: -1 is not positive"),
        (["--decode", A, "--cache", "127.0.0.1:8080"], "--cache: '127.0.0.1:8080' is no http:// address"),
        (["--decode", A, "--cache", f"c={A}", f"c={B}"], "the name 'c' is used twice"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(argv)
