from __future__ import annotations

import pytest

from pdserve.errors import RequestError
from pdserve.proxy.access import Access

HERE = {"host": "localhost:8000"}


def refused(access: Access, headers: dict[str, str], peer: str) -> int:
    with pytest.raises(RequestError) as caught:
        access.look(headers, peer)
    return caught.value.status


@pytest.mark.parametrize(
    ("host", "peer"),
    [("localhost", "127.0.0.1"), ("LOCALHOST:8000", "127.0.0.1"), ("127.0.0.1:1", "127.0.0.9"), ("[::1]:8000", "::1"),
     ("127.0.0.1", "::ffff:127.0.0.1")],
)  # fmt: skip
def test_without_a_key_this_machine_may_look(host: str, peer: str) -> None:
    Access("").look({"host": host}, peer)


@pytest.mark.parametrize(
    ("headers", "peer"),
    [
        (HERE, "192.0.2.7"),
        (HERE, "testclient"),
        ({"host": "attacker.example:8000"}, "127.0.0.1"),  # a name that was made to point here
        ({"host": "127.0.0.1.attacker.example"}, "127.0.0.1"),
        ({}, "127.0.0.1"),
        ({**HERE, "x-forwarded-for": "127.0.0.1"}, "127.0.0.1"),
        ({**HERE, "forwarded": "for=192.0.2.7"}, "127.0.0.1"),
    ],
)
def test_without_a_key_nobody_else_may(headers: dict[str, str], peer: str) -> None:
    assert refused(Access(""), headers, peer) == 403


def test_without_a_key_nobody_may_change_anything() -> None:
    with pytest.raises(RequestError) as caught:
        Access("").change(HERE)
    assert caught.value.code == "no_admin_key"


def test_with_a_key_it_is_wanted_everywhere() -> None:
    access = Access("secret")
    assert refused(access, HERE, "127.0.0.1") == 401
    assert refused(access, {**HERE, "authorization": "Bearer wrong"}, "127.0.0.1") == 401
    assert refused(access, {**HERE, "authorization": "Basic secret"}, "127.0.0.1") == 401
    access.look({"authorization": "Bearer secret"}, "192.0.2.7")
    access.change({"authorization": "bearer secret"})
