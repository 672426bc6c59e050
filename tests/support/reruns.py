"""A failed test is run once more by `make test` (pytest-rerunfailures), and what the first try said is kept: it is a defect.

A plugin that tests/conftest.py takes over; without `--reruns` it does nothing.
"""

from __future__ import annotations

import pytest
import pytest_rerunfailures
import pytest_timeout


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """pytest-timeout sets its clock once for a test and stops it at the first failure: the second try would have none."""
    if getattr(item, "execution_count", 1) > 1:
        settings = pytest_timeout._get_item_settings(item)
        if settings.timeout and not settings.func_only:
            item.ihook.pytest_timeout_set_timer(item=item, settings=settings)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Interrupted in a second try: what was held back for it (the ends of modules' and the session's fixtures) happens now."""
    session._setupstate.stack.update(pytest_rerunfailures.suspended_finalizers)
    pytest_rerunfailures.suspended_finalizers.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tries = terminalreporter.stats.get("rerun", [])
    if not tries:
        return
    terminalreporter.section("failed by chance or for good: each of these is a defect to mend", yellow=True)
    for report in tries:
        terminalreporter.write_sep("_", f"first try: {report.nodeid} ({report.when})", yellow=True)
        terminalreporter.write_line(report.longreprtext)
        for title, text in report.sections:
            terminalreporter.write_sep("-", title)
            terminalreporter.write_line(text)
