from __future__ import annotations

import pytest

from pdserve.errors import ConfigError, RequestError
from pdserve.proxy import slo
from pdserve.proxy.keys import Key
from pdserve.proxy.slo import HEADER, Classes, SloClass

CLASSES = slo.parsed(["fast:ttft=0.5,itl=0.05,priority=-5", "batch:ttft=30,priority=10"], SloClass(ttft=2))


def test_classes_are_read() -> None:
    assert CLASSES.by_name["fast"] == SloClass("fast", 0.5, 0.05, -5)
    assert list(CLASSES.by_name) == ["default", "fast", "batch"]
    assert not slo.parsed([], SloClass()).by_name["default"].targets


@pytest.mark.parametrize(
    "text", ["", ":ttft=1", "a b", "default:ttft=1", "x:ttft", "x:ttft=soon", "x:ttft=-1", "x:ttft=nan", "x:itl=inf", "x:tpot=1"]
)
def test_what_is_no_class(text: str) -> None:
    with pytest.raises(ConfigError):
        slo.parsed([text], SloClass())
    with pytest.raises(ConfigError):
        slo.parsed(["a", "a"], SloClass())
    with pytest.raises(ConfigError, match="too many"):
        slo.parsed([f"c{n}" for n in range(17)], SloClass())


@pytest.mark.parametrize(
    ("key", "header", "priority", "name"),
    [
        (Key("k"), b"", None, "default"),
        (Key("k", slo="batch"), b"fast", None, "batch"),
        (Key("k"), b"fast", 20, "fast"),
        (Key("k"), b"", 20, "batch"),
        (Key("k"), b"", 3, "default"),
        (Key("k"), b"", -1, "fast"),
        (Key("k"), b"", -50, "default"),
    ],
)
def test_whose_class_it_is(key: Key, header: bytes, priority: int | None, name: str) -> None:
    assert CLASSES.of(key, [(HEADER, header)] if header else [], priority).name == name


def test_a_keys_own_target_stands_above_its_class() -> None:
    assert CLASSES.of(Key("k", ttft=9.0), [], None).ttft == 9
    assert Classes().of(Key("k", ttft=9.0), [(HEADER, b"anything")], 4).ttft == 9


def test_a_class_that_there_is_not() -> None:
    with pytest.raises(RequestError, match="Known: default, fast, batch"):
        CLASSES.of(Key("k"), [(HEADER, b"slow")], None)
