"""What can be told of the NBD server without asking QEMU. The rest: live/test_export.py."""

import socket

from qmpblock.export.server import is_listening, remove_socket


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


def test_a_link_in_the_place_of_our_directory_removes_no_socket(tmp_path):
    """Root removed any UNIX socket of the host to which such a link led."""
    (tmp_path / "run").mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as victim:
        victim.bind(str(tmp_path / "run" / "nbd"))
    (tmp_path / "qmpblock-deadbeef").symlink_to("run")
    remove_socket(str(tmp_path / "qmpblock-deadbeef" / "nbd"))
    assert (tmp_path / "run" / "nbd").is_socket()
    assert (tmp_path / "qmpblock-deadbeef").is_symlink()


def test_a_socket_of_ours_goes_with_its_directory(tmp_path):
    folder = tmp_path / "qmpblock-deadbeef"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(folder / "nbd"))
    remove_socket(str(folder / "nbd"))
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    (folder / "nbd").write_text("no socket")
    remove_socket(str(folder / "nbd"))
    assert (folder / "nbd").exists()
