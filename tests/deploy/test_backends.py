"""Each backend against the shipped rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.deploy.backends import conformance
from pdserve.deploy.backends.base import Backend
from pdserve.deploy.backends.local import LocalBackend


@pytest.mark.parametrize("rule", conformance.RULES, ids=lambda rule: rule.__name__)
def test_local(rule: Callable[[Backend, Path], None], tmp_path: Path) -> None:
    rule(LocalBackend(children_seconds=0.3), tmp_path)
