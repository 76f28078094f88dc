"""How an export for others is reached. With QEMUs: live/test_points.py."""

import os

import pytest

from qmpblock.export.served import Served, _reached
from qmpblock.qemu.connection import NBDAccess


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (NBDAccess(), Served("n-0", "/t t/nbd", "nbd+unix:///n-0?socket=/t%20t/nbd")),
        (NBDAccess("/r/nbd"), Served("n-0", "/r/nbd", "nbd+unix:///n-0?socket=/r/nbd")),
        (NBDAccess("h:1"), Served("n-0", "", "nbd://h:1/n-0")),
        (NBDAccess("[::1]:2"), Served("n-0", "", "nbd://[::1]:2/n-0")),
        (NBDAccess("h:1", "/creds"), Served("n-0", "", "nbds://h:1/n-0")),
    ],
)
def test_its_address(access, expected):
    assert _reached("n-0", access, "/t t/nbd") == expected


def test_a_relative_socket_is_named_in_full():
    found = _reached("n-0", NBDAccess("./nbd"), "")
    assert found.socket == os.path.join(os.getcwd(), "nbd")
