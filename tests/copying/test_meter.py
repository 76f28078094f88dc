"""How far something is that is no job."""

from qmpblock.copying.meter import Meter


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
