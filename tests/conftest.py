"""What all tests share."""

import signal

import pytest
from hypothesis import HealthCheck, settings

from qmpblock.qemu import lock

collect_ignore = ["outside"]  # a project of its own, which tests/live/test_outside.py runs

# A shell's background job ignores SIGINT, and hands that on: programs that tests interrupt would
# never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two noisy cores: a deadline, and how slowly examples come, would say more of the machine than of
# the code.
settings.register_profile("qmpblock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qmpblock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A soak takes what it takes."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(0))


class Told:
    """Says of a failure at once what failed: a run that is ended from outside has no summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message.partition("\n")[0] if crash else ""
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when}) - {reason}")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    if terminal is not None:  # xdist's workers have none
        plugins.register(Told(terminal))


@pytest.fixture(autouse=True)
def nobody_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test declares dead in this process lives in the next: run ids are used again."""
    monkeypatch.setattr(lock, "_abandoned", set())
