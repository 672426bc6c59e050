"""Shared by the tests of what lies below DRAM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tier_world import World


@pytest.fixture
def world():
    made = []

    def make(*args, **rules):
        made.append(World(*args, **rules))
        return made[-1]

    yield make
    for w in made:
        w.tier.faults.resume()
        w.tiering.close(5.0)
