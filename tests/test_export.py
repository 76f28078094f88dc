"""The parts of exports that need no QEMU."""

import socket

from qmpblock.export import _is_listening


def test_a_listening_socket_is_found_also_when_unlinked(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not _is_listening(str(path))
        listener.listen()
        assert _is_listening(str(path))
        path.unlink()
        assert _is_listening(str(path))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other"))
            assert not _is_listening(str(tmp_path / "other"))
    assert not _is_listening(str(path))
