"""Who is connected to a socket: real sockets, of this process and another."""

import os
import socket
import subprocess
import sys

import pytest

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.host.socketholders import holders

CONNECT = (
    "import socket,sys; s=socket.socket(int(sys.argv[1])); s.connect(eval(sys.argv[2]));input()"
)


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen(4)
        yield sock


def client(family, target):
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(int(family)), repr(target)], stdin=subprocess.PIPE
    )


def test_only_those_who_were_taken_in(listener, tmp_path):
    address = UnixAddress(str(tmp_path / "s"))
    assert holders(address) == ()
    other = client(socket.AF_UNIX, address.path)
    accepted, _ = listener.accept()
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(address.path)
        assert holders(address) == (other.pid,)
        (tmp_path / "link").symlink_to("s")
        assert holders(UnixAddress(str(tmp_path / "link"))) == (other.pid,)
        second, _ = listener.accept()
        assert holders(address) == tuple(sorted((other.pid, os.getpid())))
        second.close()
    other.communicate(b"\n")
    accepted.close()
    assert holders(address) == ()


def test_a_tcp_port_of_this_host():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert holders(TCPAddress("127.0.0.1", port)) == ()
        other = client(socket.AF_INET, ("127.0.0.1", port))
        accepted, _ = server.accept()
        assert holders(TCPAddress("127.0.0.1", port)) == (other.pid,)
        other.communicate(b"\n")
        accepted.close()


def test_what_is_not_there(tmp_path):
    assert holders(UnixAddress(str(tmp_path / "nosuch"))) == ()
