"""Patience for a machine that stalls: only a test that fails waits for as long as this."""

import pytest

from pdserve.transfer import client


@pytest.fixture(autouse=True)
def _patient_clients(monkeypatch):
    """A daemon that starts, or that gets no processor for a while, is slow and not gone."""
    monkeypatch.setattr(client, "CONNECT_S", 20.0)
