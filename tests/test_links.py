"""Links on the way to something."""

import errno
import os
import re
import socket

import pytest
from headers_of_eve import open_to_all
from otherusers import EVE

from qmpblock.address import UnixAddress
from qmpblock.links import walk
from qmpblock.sockets import open_socket


def test_ways_are_walked_as_the_kernel_does(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "up").symlink_to("../a/b")
    (tmp_path / "a" / "full").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "to-file").symlink_to("a/../file")
    monkeypatch.chdir(tmp_path)
    for way in (
        "a",
        "./a",
        "a/up",
        "a/full/up/..",
        "/",
        ".",
        "file",
        "to-file",
        f"/proc/self/root{tmp_path}/a",
        "/proc/self/cwd/a",
    ):
        fd = walk(tmp_path.joinpath(way) if way == "." else type(tmp_path)(way), os.R_OK)
        assert os.path.samestat(os.fstat(fd), os.stat(way)), way
        os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    for way, number in (
        ("loop", errno.ELOOP),
        ("none", errno.ENOENT),
        ("file/x", errno.ENOTDIR),
    ):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            walk(type(tmp_path)(way), os.R_OK)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to be led astray")
async def test_her_monitors_name_does_not_become_another_ones():
    """What root does to her VM would have been done to that one."""
    with open_to_all() as place, socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place / "other"))
        other.listen()
        (place / "monitor").symlink_to("other")
        for link, mode, leads in ((0, 0o600, True), (EVE, 0o666, True), (EVE, 0o660, False)):
            os.lchown(place / "monitor", link, link)
            (place / "other").chmod(mode)
            if leads:
                (await open_socket(UnixAddress(str(place / "monitor")))).close()
                other.accept()[0].close()
                continue
            with pytest.raises(PermissionError, match="the link monitor of user 61666, who may"):
                await open_socket(UnixAddress(str(place / "monitor")))
