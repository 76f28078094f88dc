"""What two views of a ring say. Real hangs: live/test_polling.py, live/test_hang.py."""

import pytest

from qmpblock.testing.hang import Look, Queue


def queue(offered, seen, taken, done, *, kicks_off=False, in_flight=0):
    return Queue("/machine/vd0", 0, offered, seen, taken, done, kicks_off, in_flight)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (queue(5, 5, 4, 4), "1 requests are in the ring, QEMU has seen them and not taken"),
        (queue(5, 4, 4, 4), "QEMU has not seen them"),
        (queue(5, 5, 4, 4, kicks_off=True), "kicks are off"),
        (queue(5, 5, 5, 3, in_flight=2), "QEMU works on 2 requests"),
        (queue(2, 2, 0xFFFE, 0xFFFE), "4 requests are in the ring"),
    ],
)
def test_every_cause(seen, words):
    assert words in seen.cause()
    assert words in Look((seen,), ()).verdict()
    assert "queue 0 of /machine/vd0: offered" in str(Look((seen,), ()))


def test_all_is_done():
    seen = queue(7, 7, 7, 7)
    assert seen.cause() == ""
    assert "every request was answered" in Look((seen,), ()).verdict()


def test_without_queues_that_is_said():
    assert Look((), ()).verdict() == "no virtio queue can be looked at"


def test_what_holds_the_vm_comes_first():
    said = Look((queue(5, 5, 4, 4),), ("jobs: one",), held="a job is pending").verdict()
    assert said.startswith("a job is pending\n")
