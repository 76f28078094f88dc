"""What `qmpblock copy` takes, and what it says of a guest, and of what came up on the way."""

from contextlib import asynccontextmanager
from types import SimpleNamespace

from qmpblock.cli.app import WARNED, Options, run
from qmpblock.cli.copy_command import copied, felt
from qmpblock.cli.recording import recording
from qmpblock.copying.job import CopyJob, CopyResult
from qmpblock.copying.latency import GuestLatency
from qmpblock.mapping import MappedDisk


def test_it_is_refused_before_anybody_is_asked(capfd):
    assert run(["copy", "unix:/no/such", "vd0", "a", "--latency", "soon"]) == 2
    assert "is not a time such as 20ms, 0.5s or 20 (milliseconds)" in capfd.readouterr().err


def test_how_the_guest_fared_is_a_sentence():
    assert felt(GuestLatency(0.02, 0.0071, 0.0314, 0.125, 8 << 20)) == (
        "the guest's requests took 7.1 ms on average, 31.4 ms at the worst moment (wanted: 20 ms); "
        "it was above that 12% of the time, and the copy was kept to 8M/s at the least"
    )
    assert felt(GuestLatency(0.1, 0.0071, 0.2, 0.5, 8 << 20, "p99", 0.05)) == (
        "the guest's requests took 7.1 ms on average, 99% of them 50.0 ms at the most, 200.0 ms at "
        "the worst moment (wanted: 100 ms); it was above that 50% of the time, and the copy was "
        "kept to 8M/s at the least"
    )
    assert felt(GuestLatency(0.0005)) == (
        "the guest read and wrote nothing meanwhile (wanted: 0.5 ms)"
    )


async def test_what_is_to_be_warned_of_is_said_once_whenever_it_is_known(capfd, monkeypatch):
    @asynccontextmanager
    async def copying(wanted, **words):
        job = CopyJob(("known before",))
        job.end()
        yield job
        job.warnings += ("found by the proof",)
        result = {"point": "start", "disks": (), "seconds": 1.0, "held": 0.0, "attempts": 1}
        job.result = CopyResult(**result, warnings=(*job.warnings, "seen at the end"))

    @asynccontextmanager
    async def connect(options, address, *, unmanaged=False):
        async def disk(name):
            return MappedDisk(None, SimpleNamespace(name=name, chain=SimpleNamespace(layers=())))

        yield SimpleNamespace(disk=disk, copy=copying)

    monkeypatch.setattr(Options, "connect", connect)
    options = Options(json=False, stall=1, nbd=None, tls_creds=None, insecure=False)
    how = {"dry_run": False, "unmanaged": False, "at": "start"}
    with recording(None) as recorder:
        assert await copied(options, "vm", ("vd0=c",), recorder=recorder, **how) == WARNED
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        "warning: known before",
        "warning: found by the proof",
        "warning: seen at the end",
    ]
