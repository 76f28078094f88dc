"""What can be told of the NBD server without asking QEMU. The rest: live/test_export.py."""

import socket

from qmpblock.export.server import is_listening


def test_a_listening_socket_is_found_also_when_unlinked(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not is_listening(str(path))
        listener.listen()
        assert is_listening(str(path))
        path.unlink()
        assert is_listening(str(path))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other"))
            assert not is_listening(str(tmp_path / "other"))
    assert not is_listening(str(path))
