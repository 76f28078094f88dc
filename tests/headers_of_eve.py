"""Images whose headers a hostile user wrote: each leads to what is not theirs."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from otherusers import EVE

SECRET = b"of root's alone\n" * 4096


def img(*words):
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def give(path, user=EVE, mode=0o600):
    os.chown(path, user, user)
    path.chmod(mode)
    return path


def renamed(file, before, after):
    """Write another name over one in a header."""
    old, new = os.fsencode(before), os.fsencode(after)
    assert len(new) <= len(old)
    new = new.replace(b"/", b"/" * (len(old) - len(new) + 1), 1)
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))


def with_data_file(file, leads_to):
    stand_in = file.with_name("stand-in-" + "x" * 100)
    img("create", "-f", "qcow2", "-o", f"data_file={stand_in}", file, "64K")
    renamed(file, stand_in, leads_to)
    return file


def over(file, name, fmt="raw"):
    img("create", "-u", "-f", "qcow2", "-b", name, "-F", fmt, file, "64K")
    return file


def described(**options):
    return "json:" + json.dumps(options)


def in_file(path):
    return {"driver": "file", "filename": str(path)}


@contextlib.contextmanager
def open_to_all(place="/tmp"):
    """Give a directory that she can come to; of pytest's own each session takes that away."""
    path = Path(tempfile.mkdtemp(prefix="qe-", dir=place))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


# linux/inotify.h
OPENED = 0x20
CHANGED = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800


class Watch:
    """Sees what is done to files, or to directories and what is in them (inotify(7))."""

    def __init__(self, *paths, events):
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in paths:
            assert libc.inotify_add_watch(self._fd, os.fsencode(path), events) > 0

    def seen(self):
        """Whether there was anything since the last time."""
        try:
            return bool(os.read(self._fd, 1 << 16))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self._fd)


class Place:
    """Eve's directory, with an image of hers, and what of root's lies beside it.

    :ivar secret: that only root may read; `hidden`: that all may, in a directory only for root.
    """

    def __init__(self, path):
        self.eve, self.root = path / "eve", path / "root"
        for directory in (self.eve, self.root):
            directory.mkdir()
        self.secret = path / "secret.raw"
        self.hidden = self.root / "hidden.raw"
        for file in (self.secret, self.hidden):
            file.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self.hidden.chmod(0o644)
        self.root.chmod(0o700)
        give(self.eve, mode=0o700)
        self.hers = self.eve / "hers.raw"
        self.hers.write_bytes(bytes(65536))
        self.top = self.eve / "top.qcow2"

        self._watch = Watch(self.secret, self.hidden, events=OPENED)

    def opened(self):
        """Whether anybody has opened what is root's (O_PATH apart, which gives no right to it)."""
        return self._watch.seen()

    def close(self):
        self._watch.close()

    def finish(self):
        self.opened()  # while it was made
        for file in self.eve.iterdir():
            if not file.is_symlink():
                give(file)
        return self.top


def data_file(place, server):
    with_data_file(place.top, place.secret)


def data_file_on_a_server(place, server):
    with_data_file(place.top, f"nbd:unix:{server}")


def data_file_below(place, server):
    with_data_file(place.eve / "mid.qcow2", place.secret)
    over(place.top, "mid.qcow2", "qcow2")


def backing(place, server):
    over(place.top, place.secret)


def backing_in_a_hidden_directory(place, server):
    over(place.top, place.hidden)


def backing_by_a_relative_name(place, server):
    over(place.top, "../secret.raw")


def backing_by_a_link(place, server):
    (place.eve / "link").symlink_to(place.secret)
    over(place.top, "link")


def backing_of_the_backing(place, server):
    over(place.eve / "mid.qcow2", place.secret)
    over(place.top, "mid.qcow2", "qcow2")


def backing_of_qed(place, server):
    place.top = place.eve / "top.qed"
    img("create", "-u", "-f", "qed", "-b", place.secret, "-F", "raw", place.top, "64K")


def backing_of_qcow(place, server):
    place.top = place.eve / "top.qcow"
    img("create", "-u", "-f", "qcow", "-b", place.secret, "-F", "raw", place.top, "64K")


def described_file(place, server):
    over(place.top, described(driver="raw", file=in_file(place.secret)))


def described_data_file(place, server):
    inner = with_data_file(place.eve / "inner.qcow2", place.hers)
    over(
        place.top,
        described(driver="qcow2", file=in_file(inner), **{"data-file": in_file(place.secret)}),
        "qcow2",
    )


def described_server_as_data_file(place, server):
    inner = with_data_file(place.eve / "inner.qcow2", place.hers)
    nbd = {"driver": "nbd", "server": {"type": "unix", "path": str(server)}}
    over(
        place.top,
        described(driver="qcow2", file=in_file(inner), **{"data-file": nbd}),
        "qcow2",
    )


def described_in_dotted_words(place, server):
    inner = with_data_file(place.eve / "inner.qcow2", place.hers)
    words = {"data-file.driver": "nbd", "data-file.path": str(server)}
    over(place.top, described(driver="qcow2", file=in_file(inner), **words), "qcow2")


def server(place, server):
    over(place.top, f"nbd:unix:{server}")


def server_by_its_uri(place, server):
    over(place.top, f"nbd+unix:///?socket={server}")


def server_as_a_format(place, server):
    over(place.top, place.hers, "nbd")


def mirrored(place, server):
    """A driver that opens several files."""
    both = {"driver": "quorum", "children": [in_file(place.secret)], "vote-threshold": 1}
    over(place.top, described(driver="raw", file=both | {"file": in_file(place.hers)}))


def rules_from_a_file(place, server):
    inner = {"driver": "blkdebug", "config": str(place.secret), "file": in_file(place.hers)}
    over(place.top, described(driver="raw", file=inner))


def directory(place, server):
    over(place.top, f"fat:{place.root}")


def device(place, server):
    over(place.top, "/dev/zero")


def fifo(place, server):
    os.mkfifo(place.eve / "pipe")
    over(place.top, "pipe")


def extents(place, server, names=None):
    place.top = place.eve / "top.vmdk"
    place.top.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="monolithicFlat"\n\n# Extent description\n'
        + "".join(f'RW 128 FLAT "{name}" 0\n' for name in names or [place.secret])
        + '\n# The Disk Data Base\nddb.adapterType = "ide"\n'
    )


def extents_on_a_server(place, server):
    extents(place, server, [f"nbd:unix:{server}"])


def extents_below(place, server):
    extents(place, server)
    place.top.rename(place.eve / "mid.vmdk")
    place.top = over(place.eve / "top.qcow2", "mid.vmdk", "vmdk")


def parent_of_vmdk(place, server):
    """A sparse one, whose description is inside, and names what lies below."""
    place.top = place.eve / "top.vmdk"
    below = place.eve / ("b" * 100 + ".vmdk")
    img("create", "-f", "vmdk", below, "64K")
    img("create", "-f", "vmdk", "-b", below, "-F", "vmdk", place.top)
    renamed(place.top, below, place.secret)


HEADERS = [
    data_file,
    data_file_on_a_server,
    data_file_below,
    backing,
    backing_in_a_hidden_directory,
    backing_by_a_relative_name,
    backing_by_a_link,
    backing_of_the_backing,
    backing_of_qed,
    backing_of_qcow,
    described_file,
    described_data_file,
    described_server_as_data_file,
    described_in_dotted_words,
    server,
    server_by_its_uri,
    server_as_a_format,
    mirrored,
    rules_from_a_file,
    directory,
    device,
    fifo,
    extents,
    extents_on_a_server,
    extents_below,
    parent_of_vmdk,
]
