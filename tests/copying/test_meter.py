"""How far something is that is no job."""

from qmpblock.copying.job import CopyJob
from qmpblock.copying.meter import DiskMeters, Meter
from qmpblock.qemu.job import Progress


def test_it_tells_rate_and_what_is_to_go(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seen = []
    meter = Meter("comparing", 1000, seen.append)
    now[0] += 2
    meter.set(200)
    assert [(one.done, one.total, one.rate, one.eta) for one in seen] == [
        (0, 1000, 0.0, None),
        (200, 1000, 100.0, 8.0),
    ]
    assert (seen[0].status, seen[0].phase, seen[1].remaining) == ("running", "comparing", 800)


def test_nobody_need_listen():
    Meter("comparing", 1000, None).set(10)


def test_of_several_disks_all_is_shown_and_each():
    job = CopyJob()
    for name in ("vd0", "vd1"):
        job.publish(name, Progress("concluded", "ended", 3, 3))
    meters = DiskMeters("verifying", {"vd0": 10, "vd1": 30}, job)
    assert (job.progress.phase, job.progress.done, job.progress.total) == ("verifying", 0, 40)
    meters.of("vd0")(Progress("running", "comparing", 10, 10))
    meters.of("vd1")(Progress("running", "comparing", 6, 30, rate=2.0, eta=12.0))
    assert (job.progress.done, job.progress.total, job.progress.status) == (16, 40, "running")
    assert (job.disks["vd0"].done, job.disks["vd1"].done) == (10, 6)
    assert {one.phase for one in job.disks.values()} == {"verifying"}
    assert not job.progress.ready
