"""Which file a process has open under what name."""

import os
import signal
import subprocess
import sys

import pytest

from qmpblock.graph.model import Node
from qmpblock.graph.places import FileId, Missing, Place
from qmpblock.host.openfiles import NOWHERE, OpenFiles, sees_directory

ME = os.getpid()


def node(filename, driver="file", descriptors=()):
    return Node("s", driver, str(filename), 512, False, descriptors=tuple(descriptors))


def place(filename, pid=ME, **more):
    return OpenFiles(pid).place(node(filename, **more))


@pytest.fixture
def qemu(monkeypatch):
    """Have processes count as QEMU."""
    monkeypatch.setattr(OpenFiles, "is_qemu", True)


def test_a_file_by_its_name_and_by_links(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "dir").symlink_to(real)
    image = real / "image"
    image.write_bytes(b"x")
    (tmp_path / "link").symlink_to(image)
    with image.open():
        file = FileId.of(image.stat())
        assert place(image) == Place(file, str(image), str(image), str(image))
        through = str(tmp_path / "dir" / "image")
        assert place(through) == Place(file, through, str(image), through)
        link = str(tmp_path / "link")
        assert place(link) == Place(file, link, link, link, linked=True)


def test_what_was_renamed_replaced_or_removed(tmp_path, qemu):
    image = tmp_path / "image"
    image.write_bytes(b"x")
    with image.open():
        image.rename(tmp_path / "moved")
        assert "renamed" in place(image).reason
        image.write_bytes(b"another")
        assert place(image).reason.startswith("is another file now")
        image.unlink()
        (tmp_path / "moved").unlink()
        assert place(image).certain
        assert "has been removed" in place(tmp_path / "moved").reason


def test_a_hard_link_is_the_same_file(tmp_path):
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(b"x")
    os.link(image, other)
    with image.open():
        assert place(other).file == place(image).file


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", "/")
    (tmp_path / "sub").mkdir()
    for name in ("image", "sub/image"):
        (tmp_path / name).write_bytes(b"x")
    with (tmp_path / "image").open():
        assert place("image").path == str(tmp_path / "image")
        assert place("./image").here == str(tmp_path / "image")
        with (tmp_path / "sub" / "image").open():
            assert "one of several" in place("image").reason
            assert not place("image").certain
            assert place("sub/image").path == str(tmp_path / "sub/image")
            # What is absolute is never in doubt.
            assert place(tmp_path / "image").path == str(tmp_path / "image")


def test_descriptors_that_it_was_given(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"x")
    with image.open() as given:
        for name in (f"/proc/self/fd/{given.fileno()}", f"/dev/fd/{given.fileno()}"):
            assert isinstance(place(name), Missing)  # it opened none itself
        with image.open():
            for name in (
                f"/proc/self/fd/{given.fileno()}",
                f"/proc/{ME}/fd/{given.fileno()}",
                f"/dev/fd/{given.fileno()}",
            ):
                assert place(name).path == str(image)
            assert place("/dev/fdset/3", descriptors=[given.fileno()]).path == str(image)
            assert isinstance(place("/dev/fdset/3"), Missing)
            image.unlink()
            assert "removed" in place("/dev/fdset/3", descriptors=[given.fileno()]).reason


def test_what_cannot_be_told(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"x")
    for pid, words in ((None, "over TCP"), (1 << 30, "cannot be seen")):
        files = OpenFiles(pid)
        assert words in files.place(node(image)).reason
        assert not files.place(node(image)).certain
    with image.open():
        assert "driver is nbd" in place(image, driver="nbd").reason
        assert isinstance(place(""), Missing)
        assert isinstance(place("bad\0name"), Missing)
        assert isinstance(place(tmp_path), Missing)


def test_a_process_that_is_not_qemu(tmp_path):
    """A manager made the monitor's socket and gave it to QEMU."""
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            found = place(tmp_path / "image", other.pid)
            assert "is not QEMU" in found.reason
            assert not found.certain
            assert "is not QEMU" in sees_directory(other.pid, str(tmp_path))
        finally:
            other.kill()


def test_only_its_user_and_root_may_look(tmp_path):
    if os.geteuid():
        pytest.skip("to be another user takes root")
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        os._exit(0 if "only its user and root" in OpenFiles(os.getppid()).blind else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_root_that_may_list_descriptors_and_not_look_into_them():
    if os.geteuid():
        pytest.skip("to be another user takes root")
    with subprocess.Popen(["sleep", "60"], user=65534) as other:
        try:
            code = "from qmpblock.host.openfiles import OpenFiles; "
            code += f"print(OpenFiles({other.pid}).blind)"
            words = ["setpriv", "--bounding-set", "-sys_ptrace", sys.executable, "-c", code]
            assert "SYS_PTRACE" in subprocess.check_output(words, text=True)
        finally:
            other.kill()


def test_directories(tmp_path, qemu):
    assert sees_directory(ME, str(tmp_path)) is None
    assert sees_directory(ME, str(tmp_path / "none")) == NOWHERE
    assert "over TCP" in sees_directory(None, str(tmp_path))


def test_a_directory_with_a_mount_of_its_own(tmp_path, qemu):
    script = f"mount -t tmpfs none {tmp_path} && mkdir {tmp_path}/only && echo up && sleep 60"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as other:
        try:
            if other.stdout.readline() != b"up\n":
                pytest.skip("no mount namespace can be had here")
            assert "is another one for the VM" in sees_directory(other.pid, str(tmp_path))
            assert "only for the VM" in sees_directory(other.pid, str(tmp_path / "only"))
            (tmp_path / "here").mkdir()
            assert "not there for the VM" in sees_directory(other.pid, str(tmp_path / "here"))
            assert sees_directory(other.pid, "/usr") is None
        finally:
            other.send_signal(signal.SIGTERM)


def test_links_stay_inside_another_root(tmp_path):
    """What is absolute in a link counts from the process's root, not from ours."""
    if os.geteuid():
        pytest.skip("chroot takes root")
    inside = tmp_path / "store"
    inside.mkdir()
    (inside / "image").write_bytes(b"x")
    (tmp_path / "link").symlink_to("/store/image")
    code = (
        "import os, sys, time; file = open(sys.argv[1] + '/store/image');"
        "os.chroot(sys.argv[1]); os.chdir('/'); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout.readline() == b"up\n"
            found = place("/link", other.pid)
            assert found.file == FileId.of((inside / "image").stat())
            assert os.path.samefile(found.here, inside / "image")
            # Opened before it went there, by a name of ours.
            assert place(inside / "image", other.pid).here == str(inside / "image")
        finally:
            other.kill()
