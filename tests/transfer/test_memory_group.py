"""Limits of control groups, of either version, as files say them."""

from __future__ import annotations

import pytest

from pdserve.transfer import memory_group
from pdserve.transfer.memory_group import NO_LIMIT


@pytest.fixture
def group(tmp_path):
    """Writes a group's files; group.left(LINES of /proc/self/cgroup)."""

    class Groups:
        def v2(self, path: str, limit: str, used: int, **stat: int) -> None:
            self.write(path, ("memory.max", "memory.current"), limit, used, stat)

        def v1(self, path: str, limit: int, used: int, **stat: int) -> None:
            self.write(f"memory/{path}", ("memory.limit_in_bytes", "memory.usage_in_bytes"), limit, used, stat)

        def write(self, path: str, names: tuple[str, str], limit: object, used: int, stat: dict[str, int]) -> None:
            folder = tmp_path / "mount" / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text(f"{used}\n")
            (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))

        def left(self, *lines: str) -> int:
            (tmp_path / "own").write_text("".join(f"{line}\n" for line in lines))
            return memory_group.left(tmp_path / "mount", tmp_path / "own")

    return Groups()


def test_none_says_no_limit(group, tmp_path):
    assert memory_group.left(tmp_path, tmp_path / "nothing") == NO_LIMIT
    assert group.left("0::/") == NO_LIMIT
    assert group.left("4:memory:/a", "3:cpu,cpuacct:/b") == NO_LIMIT
    group.v2("a", "max", 7)
    assert group.left("0::/a") == NO_LIMIT


def test_the_tightest_around_counts_less_what_files_hold(group):
    group.v2("a", "1000", 600, anon=300, inactive_file=50, active_file=150)
    group.v2("a/b", "5000", 100)
    assert group.left("0::/a/b") == 1000 - 600 + 200
    group.v2("a/b", "500", 100, file=90)
    assert group.left("0::/a/b") == 400
    assert group.left("0::/elsewhere") == NO_LIMIT


def test_version_one(group):
    group.v1("", 9223372036854771712, 5)
    assert group.left("4:memory:/") == NO_LIMIT
    group.v1("pod", 1000, 600, inactive_file=1, total_inactive_file=30, total_active_file=20)
    assert group.left("9:name=systemd:/x", "4:memory:/pod", "0::/") == 450


def test_a_container_sees_its_own_group_as_the_root(group):
    group.v1("", 1000, 600)
    assert group.left("4:memory:/kubepods/pod7/abc") == 400
    group.v2("", "900", 800)
    assert group.left("0::/../..") == 100


def test_more_used_than_allowed_is_nothing(group):
    group.v2("a", "100", 600)
    assert group.left("0::/a") == 0
