"""What all tests share."""

import signal

import pytest
from hypothesis import settings

from qmpblock.qemu import lock

collect_ignore = ["outside"]  # a project of its own, which tests/live/test_outside.py runs

# A shell's background job ignores SIGINT, and hands that on: programs that tests interrupt would
# never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two noisy cores: a deadline would say more of the machine than of the code.
settings.register_profile("qmpblock", deadline=None)
settings.load_profile("qmpblock")


@pytest.fixture(autouse=True)
def nobody_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test declares dead in this process lives in the next: run ids are used again."""
    monkeypatch.setattr(lock, "_abandoned", set())
