"""What the control group of this process still allows it: filling an arena beyond that would get the process killed, not refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 62
#: of either version: the limit, what is used
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
#: pages of files, which the kernel takes back when it needs them; version 1 counts those of groups below apart
_RECLAIMABLE = (("inactive_file", "active_file"), ("total_inactive_file", "total_active_file"))


def left(mount: Path = MOUNT, own: Path = _OWN) -> int:
    """Bytes, the least of all groups around this process; NO_LIMIT where none has a limit."""
    return min([NO_LIMIT, *(_left_in(folder) for folder in _folders(mount, own))])


def _folders(mount: Path, own: Path) -> Iterator[Path]:
    """This process' group and those around it, of both versions. In a container the mount may begin at the container's group,
    whatever the path says: folders that are not there have no limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for root in [mount / "memory"] if controllers else [mount, mount / "unified"]:
            group = root / path.lstrip("/")
            while True:
                yield group
                if group == root:
                    break
                group = group.parent


def _left_in(folder: Path) -> int:
    for (limit, used), reclaimable in zip(_FILES, _RECLAIMABLE, strict=True):
        try:
            most = (folder / limit).read_text().strip()
            now = int((folder / used).read_text())
            facts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
            if most.isdigit():  # "max": none
                return max(0, int(most) - now + sum(int(facts.get(name, 0)) for name in reclaimable))
        except (OSError, ValueError):
            continue
    return NO_LIMIT
