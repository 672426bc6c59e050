"""The arena's making: what does not fit is refused before a page is taken, and what is broken off leaves nothing."""

import os

import pytest

from pdserve.errors import StartError
from pdserve.transfer import arena


@pytest.fixture
def path():
    path = arena.path_for(f"test-{os.getpid()}-arena")
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("short", ["_free_memory", "free_shared_memory"])
def test_more_than_there_is_is_refused_before_a_page_is_taken(path, monkeypatch, short):
    monkeypatch.setattr(arena, short, lambda: 1 << 20)
    touched = []
    with pytest.raises(StartError, match=r"cannot take 0\.00 GiB.*are free.*Lower cache\.size \(--size\)"):
        arena.create(path, 2 << 20, touched.append)
    assert not touched
    assert not path.exists()


@pytest.mark.parametrize("why", [SystemExit, KeyboardInterrupt, OSError])
def test_making_it_that_is_broken_off_leaves_nothing(path, why):
    def end(done):
        raise why

    with pytest.raises(StartError if why is OSError else why):
        arena.create(path, 1 << 20, end)
    assert not path.exists()


def test_what_an_earlier_process_left_makes_room_first(path):
    arena.create(path, 1 << 20).close()
    made = arena.create(path, 2 << 20)
    assert made.size == path.stat().st_size == 2 << 20
    made.close()
