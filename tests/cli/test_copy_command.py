"""What `qmpblock copy` takes, and what it says of a guest."""

from qmpblock.cli.app import run
from qmpblock.cli.copy_command import felt
from qmpblock.copying.latency import GuestLatency


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
