from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.proxy.dashboard import board
from pdserve.proxy.dashboard.board import Board, Folder, Memory

LENGTH = 60  # of samples, here: each is a file written anew


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "LENGTH", LENGTH)


@pytest.fixture(params=["memory", "folder"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Board]]:
    made: list[Board] = []

    def new() -> Board:
        made.append(Memory() if request.param == "memory" else Folder(tmp_path / "dashboard"))
        return made[-1]

    yield new
    for one in made:
        one.close()


def test_what_was_published_is_there(make: Callable[[], Board]) -> None:
    one = make()
    assert one.leads()
    assert (one.picture(), one.samples()) == (b"", [])
    one.publish(b'{"a":1}', b'{"t":1}')
    one.publish(b'{"a":2}', b"")
    one.publish(b'{"a":3}', b'{"t":2}')
    assert one.picture() == b'{"a":3}'
    assert one.samples() == [b'{"t":1}', b'{"t":2}']


def test_so_many_are_kept_and_no_more(make: Callable[[], Board]) -> None:
    one = make()
    assert one.leads()
    for n in range(2 * LENGTH + 10):
        one.publish(b"{}", b'{"t":%d}' % n)
    samples = one.samples()
    assert len(samples) == LENGTH
    assert samples[-1] == b'{"t":%d}' % (2 * LENGTH + 9)


def test_a_watcher_is_noticed_for_a_while(make: Callable[[], Board], monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    assert not one.watched()
    one.watch()
    assert one.watched()
    monkeypatch.setattr(board, "_WATCHED_FOR", -1.0)
    assert not one.watched()


def test_one_of_the_workers_leads_and_another_takes_over(tmp_path: Path) -> None:
    first, second = Folder(tmp_path / "d"), Folder(tmp_path / "d")
    assert first.leads()
    assert not second.leads()
    first.publish(b'{"a":1}', b'{"t":1}')
    assert (second.picture(), second.samples()) == (b'{"a":1}', [b'{"t":1}'])
    second.watch()
    assert first.watched()
    first.close()
    assert second.leads()
    second.publish(b'{"a":2}', b'{"t":2}')
    assert second.samples() == [b'{"t":1}', b'{"t":2}']
    second.close()


def test_files_stay_within_twice_the_length(tmp_path: Path) -> None:
    one = Folder(tmp_path / "d")
    assert one.leads()
    for n in range(5 * LENGTH):
        one.publish(b"{}", b'{"t":%d}' % n)
    lines = sum(file.read_bytes().count(b"\n") for file in (tmp_path / "d").glob("samples*"))
    assert lines <= 2 * LENGTH
    one.close()


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    one = Folder(tmp_path / "d")
    assert one.leads()
    one.publish(b"{}", b'{"t":1}')
    with (tmp_path / "d" / "samples").open("ab") as file:
        file.write(b'{"t":2,"ttf')
    assert one.samples() == [b'{"t":1}']
    one.close()
