"""What libvirt hands on of QEMU's answers; the rest is live (tests/live/test_libvirt.py)."""

import subprocess
import sys

import pytest

from qmpblock.address import LibvirtAddress
from qmpblock.host.libvirtd import FailedError
from qmpblock.host.processes import Peer, start_time
from qmpblock.qemu.libvirtmonitor import LibvirtMonitor, _read
from qmpblock.qemu.transport import LostError

#: As libvirt 9.0 gives them.
ANSWERS = [
    ('{"return":{},"id":"libvirt-413"}', {"return": {}, "id": "libvirt-413"}),
    (
        '{"id":"libvirt-412","error":{"class":"CommandNotFound","desc":"no"}}',
        {"id": "libvirt-412", "error": {"class": "CommandNotFound", "desc": "no"}},
    ),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_answers(text, answer):
    assert _read(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", '{"error": 1}', '{"error": {"class": "x"}}', "[" * 10000, "\udcff"],
)
def test_what_is_no_answer(text):
    with pytest.raises(LostError, match="no QEMU sends"):
        _read(text)


async def test_what_failed_since_qemu_has_ended_says_so():
    """At first libvirt says that the socket was closed, and no more."""
    ended = []
    monitor = LibvirtMonitor(LibvirtAddress("web"), lambda *_: None, lambda: ended.append(1))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monitor._peer = Peer(process.pid, 0, start_time(process.pid))
    try:
        assert await monitor.ended_by(FailedError("it refused")) is None
        assert (monitor.ended, ended) == ("", [])
    finally:
        process.kill()
        process.communicate()
    assert isinstance(await monitor.ended_by(FailedError("End of file")), LostError)
    assert monitor.ended == "the domain has ended: End of file"
    assert ended == [1]
