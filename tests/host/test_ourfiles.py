"""A directory that is opened once, and the files of ours in it."""

import errno
import os
import stat
from pathlib import Path

import pytest
from headers_of_eve import open_to_all
from otherusers import EVE

from qmpblock.graph.places import FileId
from qmpblock.host.ourfiles import Directory, keep, look, open_plain, remove, rename, write_file


@pytest.fixture
def directory(tmp_path):
    with Directory(tmp_path) as one:
        yield one


def made(directory, name="a", content=b"ours"):
    recorded = []
    fd = directory.make(name, recorded.append, lambda fd: os.write(fd, content))
    os.close(fd)
    [file] = recorded
    return file


def swap(path, target):
    path.unlink()
    path.symlink_to(target)


def test_a_file_is_recorded_before_it_has_a_name(directory, tmp_path):
    seen = []

    def record(file):
        seen.append((file, list(tmp_path.iterdir())))

    os.close(directory.make("a", record, lambda fd: os.write(fd, b"ours")))
    assert seen == [(FileId.of((tmp_path / "a").stat()), [])]
    assert (tmp_path / "a").read_bytes() == b"ours"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_it_is_as_another_one_is(directory, tmp_path):
    (tmp_path / "like").touch()
    (tmp_path / "like").chmod(0o4640)
    fd = directory.make("a", lambda file: None, lambda fd: None, like=(tmp_path / "like").stat())
    os.close(fd)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("nameless", [True, False])
def test_nothing_is_made_in_the_place_of_a_link(directory, tmp_path, monkeypatch, nameless):
    if not nameless:
        without_nameless_files(monkeypatch)
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        made(directory)
    assert not (tmp_path / "victim").exists()


def without_nameless_files(monkeypatch):
    real = os.open

    def open_(path, flags, *rest, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "as on NFS")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_)


def test_where_there_are_no_nameless_files_it_is_recorded_before_it_is_filled(
    directory, tmp_path, monkeypatch
):
    without_nameless_files(monkeypatch)
    order = []
    fd = directory.make("a", lambda file: order.append("record"), lambda fd: order.append("fill"))
    os.close(fd)
    assert order == ["record", "fill"]
    assert (tmp_path / "a").exists()


def test_only_the_file_itself_is_opened_again(directory, tmp_path):
    file = made(directory)
    fd = directory.open("a", file)
    assert os.read(fd, 9) == b"ours"
    os.close(fd)
    (tmp_path / "b").write_bytes(b"ours")  # another inode: both are there at once
    (tmp_path / "b").rename(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="another file"):
        directory.open("a", file)
    swap(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="a link"):
        directory.open("a", file)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH])
def test_a_fifo_does_not_block(directory, tmp_path, flags):
    file = made(directory)
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        directory.open("a", file, flags)


def test_only_the_file_itself_is_removed(directory, tmp_path):
    file = made(directory)
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").symlink_to("moved")
    assert not directory.remove("a", file)
    assert (tmp_path / "a").is_symlink()
    assert directory.remove("moved", file)
    assert not directory.remove("moved", file)
    assert remove(tmp_path / "moved", file) is False
    assert remove(tmp_path / "nowhere" / "a", file) is False


def test_a_directory_stays_the_one_that_was_opened(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Directory(tmp_path / "first") as directory:
        (tmp_path / "first").rename(tmp_path / "aside")
        (tmp_path / "first").symlink_to("second")
        file = made(directory)
        assert directory.holds("a", file)
        directory.sync()
    assert (tmp_path / "aside" / "a").exists()
    assert not list((tmp_path / "second").iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_only_entries_have_names(directory, name):
    with pytest.raises(ValueError, match="entry"):
        directory.status(name)


def test_it_is_ours_where_nobody_else_may_write(directory, tmp_path):
    tmp_path.chmod(0o755)
    assert directory.is_ours()
    tmp_path.chmod(0o775)
    assert not directory.is_ours()


def test_a_failed_one_leaves_no_descriptor(directory):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no"):
        directory.make("a", lambda file: None, lambda fd: fail())
    assert len(os.listdir("/proc/self/fd")) == before


def fail():
    raise OSError(errno.EIO, "no")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to be led astray")
def test_a_link_of_another_user_leads_only_where_he_may_write(tmp_path):
    """Else he has root make files anywhere, which are given to him."""
    (tmp_path / "roots").mkdir(mode=0o755)
    (tmp_path / "his").mkdir(mode=0o755)
    os.chown(tmp_path / "his", EVE, EVE)
    for target in ("roots", "his"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(target)
        with Directory(link):  # root's own leads anywhere
            pass
        os.lchown(link, EVE, EVE)
    with Directory(tmp_path / "to-his") as directory:
        assert os.path.samestat(os.fstat(directory.fd), (tmp_path / "his").stat())
    with pytest.raises(OSError, match=f"the link to-roots of user {EVE}"):
        Directory(tmp_path / "to-roots")
    with pytest.raises(OSError, match=f"the link to-roots of user {EVE}"):
        Directory(tmp_path / "his" / ".." / "to-roots" / ".")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to be led astray")
def test_what_a_group_may_write_to_is_not_his_by_that(tmp_path):
    """As /usr/local/lib is of a group that he is not in."""
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups").chmod(0o775)
    (tmp_path / "link").symlink_to("groups")
    os.lchown(tmp_path / "link", EVE, EVE)
    with pytest.raises(OSError, match=f"the link link of user {EVE}, who may not write there"):
        Directory(tmp_path / "link")
    (tmp_path / "groups").chmod(0o777)
    with Directory(tmp_path / "link"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to be led astray")
def test_a_link_of_another_user_leads_only_to_what_he_may_read(tmp_path):
    with open_to_all() as place:
        (place / "roots").mkdir()
        file, link = place / "roots" / "file", place / "link"
        file.touch()
        link.symlink_to(file)
        for directory, mode, mine, may in (
            (0o755, 0o644, 0, None),
            (0o755, 0o600, 0, "read it"),
            (0o755, 0o640, 0, "read it"),  # he is not in the group
            (0o750, 0o644, 0, "go there"),
            (0o755, 0o600, EVE, None),
        ):
            (place / "roots").chmod(directory)
            file.chmod(mode)
            os.chown(file, mine, mine)
            os.lchown(link, 0, 0)
            os.close(look(link))  # root's own leads anywhere
            os.close(look(file))
            os.lchown(link, EVE, EVE)
            if may is None:
                os.close(look(link))
                os.close(open_plain(link))
                continue
            for opened in (look, open_plain):
                with pytest.raises(OSError, match=f"the link link of user {EVE}, .* not {may}"):
                    opened(link)


ANY = (b"",)


@pytest.mark.parametrize("user", [0, EVE])
def test_a_file_that_a_person_names(tmp_path, monkeypatch, user):
    """As root and as another, whom no link can lead astray."""
    if os.geteuid() != 0:
        pytest.skip("only root has to be led astray")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "picture", "other"):
        for text in (b"a long one", b"one"):
            write_file(path, text, ANY)
            assert Path(path).read_bytes() == text
        with pytest.raises(FileExistsError, match="holds something else"):
            write_file(path, b"a picture", (b"a pic", b"two"))
        assert Path(path).read_bytes() == b"one"
        write_file(path, b"on", (b"two", b"one"))
        assert Path(path).read_bytes() == b"on"
    read, write = os.pipe()
    write_file(f"/dev/fd/{write}", b"piped", ANY)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"piped"
    os.mkfifo(tmp_path / "fifo")
    for path in ("none/picture", "other/picture", str(tmp_path), "fifo"):
        with pytest.raises(OSError, match=r"No such|Not a|Is a"):
            write_file(path, b"", ANY)
    (tmp_path / "link").symlink_to("other")
    write_file("link", b"by a link", ANY)
    assert (tmp_path / "other").read_bytes() == b"by a link"
    os.lchown(tmp_path / "link", EVE, EVE)
    if user == 0:
        with pytest.raises(PermissionError, match=f"the link link of user {EVE}, who may not"):
            write_file("link", b"hers", ANY)
        assert (tmp_path / "other").read_bytes() == b"by a link"


def test_only_what_is_among_these_is_opened(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    (tmp_path / "link").symlink_to("a")
    these = [FileId.of((tmp_path / "a").stat())]
    for name in ("a", "link"):
        os.close(open_plain(tmp_path / name, among=these))
    with pytest.raises(FileNotFoundError, match="another file"):
        open_plain(tmp_path / "b", among=these)


def test_what_is_no_directory_is_none(tmp_path):
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotADirectoryError):
        Directory(tmp_path / "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_plain_file_is_looked_at_before_it_is_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"ours")
    fd = open_plain(tmp_path / "file")
    assert os.read(fd, 9) == b"ours"
    os.close(fd)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="no regular file"):
            open_plain(path)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_file_gets_a_name_that_nothing_bears(links, directory, tmp_path, monkeypatch):
    file = made(directory)
    if not links:

        def link(*_args, **_words):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
    (tmp_path / "b").touch()
    with pytest.raises(FileExistsError):
        directory.rename("a", file, "b")
    rename(tmp_path / "a", file, str(tmp_path / "c"))
    assert directory.holds("c", file)
    assert directory.status("a") is None
    with pytest.raises(FileNotFoundError):
        directory.rename("b", file, "d")
    assert (tmp_path / "b").exists()


def test_what_is_not_whole_gets_the_name_that_says_so_or_goes(directory, tmp_path):
    file, path, partial = made(directory), tmp_path / "a", tmp_path / "a.partial"
    for _ in range(2):  # again, where whoever did it could not say so
        keep(path, file, str(partial))
        assert list(tmp_path.iterdir()) == [partial]
    path.write_text("precious")
    keep(path, file, str(partial))
    assert path.read_text() == "precious"
    path.unlink()
    keep(path, made(directory, content=b"another"), str(partial))
    assert list(tmp_path.iterdir()) == [partial]
    assert partial.read_bytes() == b"ours"
