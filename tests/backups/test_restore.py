"""Restoring: what is refused; and while others exchange what lies under the files' names."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from backuppoints import disk, point

from qmpblock.backups.check import check_backups
from qmpblock.backups.directory import open_backups
from qmpblock.backups.restore import restore
from qmpblock.errors import (
    Error,
    NoRoomError,
    NotFoundError,
    RequestError,
    UnsupportedError,
)
from qmpblock.host.ourfiles import Directory
from qmpblock.host.qemuimgcheck import QemuImgCheck
from qmpblock.host.qemuimgconvert import QemuImgConvert
from qmpblock.luks import TRIES, retried
from qmpblock.names import partial_file
from qmpblock.testing.images import Tools, find_qemu

SIZE = 4 << 20
FULL, ABOVE = "20261130T110500Z-vd0.qcow2", "20261130T120500Z-vd0.qcow2"


def run(*words):
    subprocess.run([str(word) for word in words], check=True)


def image(path, pattern, start, below=None):
    """Make an image with a MiB of something in it."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {start} 1M", path)
    if below is not None:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", path)


def told(place, name, parent=None):
    """Return what a backup says of an image that lies there."""
    data, state = (place / name).read_bytes(), (place / name).stat()
    return replace(
        disk("vd0", name, parent=parent, size=SIZE),
        format="raw",
        length=len(data),
        modified=state.st_mtime_ns,
        digest=hashlib.blake2b(data, digest_size=32).hexdigest(),
    )


@pytest.fixture
def place(tmp_path):
    """A directory of a full backup and an increment."""
    place = tmp_path / "backups"
    place.mkdir()
    image(place / FULL, 1, 0)
    image(place / ABOVE, 2, "1M", FULL)
    every = (told(place, FULL), told(place, ABOVE, FULL))
    for number, one in enumerate(every, 1):
        made = replace(point(one.file[:16], [one]), number=number)
        (place / f"{made.when}.json").write_text(json.dumps(made.as_json()))
    return place


WHOLE = b"\1" * (1 << 20) + b"\2" * (1 << 20) + bytes(2 << 20)


@pytest.fixture
def meanwhile(monkeypatch):
    """Return what has something be done between the look at the images and their conversion."""

    def arrange(what, after=None):
        convert = QemuImgConvert.convert

        async def convert_then(self, *words, **options):
            what()
            await convert(self, *words, **options)
            if after is not None:
                after()

        monkeypatch.setattr(QemuImgConvert, "convert", convert_then)

    return arrange


def exchange(path, other):
    """Put another file under a name; what bore it goes on to be there, under none."""
    os.replace(other, path)


async def test_it_is_what_the_backup_is(place, tmp_path):
    made = await restore(place, tmp_path / "to")
    assert (tmp_path / "to" / "vd0.raw").read_bytes() == WHOLE
    assert made.disks[0].images == (ABOVE, FULL)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("few", ["images", "descriptors"])
async def test_a_chain_that_is_not_taken_at_once(few, fmt, tmp_path, monkeypatch):
    """Data, zeros and what nobody wrote, of each image over all that lie below it."""
    place, names = (
        tmp_path / "backups",
        [f"20261130T0{number}0000Z-vd0.qcow2" for number in range(9)],
    )
    place.mkdir()
    for number, name in enumerate(names):
        below = names[number - 1] if number else None
        image(place / name, number + 1, f"{300 * number}k", below)
        zeros = f"write -q -z {300 * number - 128}k 128k" if number % 3 else "discard -q 3M 64k"
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 1} 3M 64k", place / name)
        run("qemu-io", "-f", "qcow2", "-c", zeros, place / name)
        one = replace(told(place, name, below), format=fmt)
        made = replace(point(name[:16], [one]), number=number + 1)
        (place / f"{made.when}.json").write_text(json.dumps(made.as_json()))
    whole = tmp_path / "whole.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", place / names[-1], whole)
    if few == "images":
        monkeypatch.setattr(sys.modules[restore.__module__], "_AT_ONCE", 3)
    else:
        low = (64 + 4 * 2 + 3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        monkeypatch.setattr(resource, "getrlimit", lambda _: low)
    seen = []
    await restore(place, tmp_path / "restored", progress=seen.append)
    target = tmp_path / "restored" / f"vd0.{fmt}"
    run("qemu-img", "compare", "-f", fmt, "-F", "raw", target, whole)
    done = [one.done for one in seen if one.phase == "restoring"]
    assert (done, done[-1]) == (sorted(done), SIZE)


@pytest.mark.parametrize("name", [FULL, ABOVE])
async def test_another_image_under_the_name_of_one_that_was_proven(
    place, tmp_path, meanwhile, name
):
    image(tmp_path / "other", 3, 0, FULL if name == ABOVE else None)
    meanwhile(lambda: exchange(place / name, tmp_path / "other"))
    await restore(place, tmp_path / "to")
    assert (tmp_path / "to" / "vd0.raw").read_bytes() == WHOLE


async def test_a_link_under_the_name_of_one_that_was_proven(place, tmp_path, meanwhile):
    """And one to another directory, in the place of that of the backups."""
    image(tmp_path / "other", 3, 0)

    def link():
        (place / FULL).unlink()
        (place / FULL).symlink_to(tmp_path / "other")
        place.rename(tmp_path / "away")
        place.symlink_to(tmp_path)

    meanwhile(link)
    await restore(place, tmp_path / "to")
    assert (tmp_path / "to" / "vd0.raw").read_bytes() == WHOLE


async def test_it_is_owned_as_the_file_that_was_proven(place, tmp_path, monkeypatch):
    """Not as what bears its name a moment later, which may be anybody's."""
    (place / FULL).chmod(0o600)
    image(tmp_path / "other", 3, 0)
    (tmp_path / "other").chmod(0o666)
    make = Directory.make

    def exchanged(self, *words, **more):
        exchange(place / FULL, tmp_path / "other")
        return make(self, *words, **more)

    monkeypatch.setattr(Directory, "make", exchanged)
    await restore(place, tmp_path / "to", at=FULL[:16])
    target = tmp_path / "to" / "vd0.raw"
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.read_bytes() == WHOLE[: 1 << 20] + bytes(SIZE - (1 << 20))


@pytest.mark.parametrize("force", [False, True])
async def test_without_room_it_is_said_what_is_left(force, place, tmp_path, monkeypatch):
    async def full(*_, **__):
        raise NoRoomError("there is no room")

    monkeypatch.setattr(QemuImgConvert, "convert", full)
    with pytest.raises(NoRoomError) as failed:
        await restore(place, tmp_path / "to", force=force)
    assert failed.value.standing == "nothing is left of what was being restored"
    assert not (tmp_path / "to").exists()


async def test_what_was_replaced_is_named_where_the_next_one_fails(place, tmp_path, monkeypatch):
    """The disk before it is restored, and nothing brings back what it took the place of."""
    name = "20261130T130500Z-{}.qcow2"
    every = []
    for one in ("vd0", "vd1"):
        image(place / name.format(one), 7, 0)
        every.append(replace(told(place, name.format(one)), disk=one, path=f"/{one}"))
    made = replace(point("20261130T130500Z", every), number=3)
    (place / f"{made.when}.json").write_text(json.dumps(made.as_json()))
    target = tmp_path / "to"
    target.mkdir()
    (target / "vd0.raw").write_bytes(b"before")
    replaced = Directory.replace

    def once(self, *words):
        if "vd1.raw" in words:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replaced(self, *words)

    monkeypatch.setattr(Directory, "replace", once)
    with pytest.raises(Error) as failed:
        await restore(place, target, force=True)
    assert failed.value.standing == f"restored, and left: {target / 'vd0.raw'}"
    assert [path.name for path in target.iterdir()] == ["vd0.raw"]


@pytest.mark.parametrize("linked", [False, True])
async def test_another_file_under_the_name_of_what_is_made(place, tmp_path, meanwhile, linked):
    """Nothing is written to it; and it does not get the disk's name."""
    other, target = tmp_path / "other", tmp_path / "to"
    other.write_bytes(b"precious")
    name = target / partial_file("vd0.raw")

    def put():
        name.unlink()
        if linked:
            name.symlink_to(other)
        else:
            os.link(other, name)

    meanwhile(put)
    with pytest.raises(Error, match="cannot make"):
        await restore(place, target)
    assert other.read_bytes() == b"precious"
    assert [one.name for one in target.iterdir()] == [name.name]


@pytest.mark.parametrize("force", [False, True])
async def test_a_link_under_the_name_that_it_is_to_have(place, tmp_path, meanwhile, force):
    """It is neither followed nor replaced, and nothing else is left."""
    other, target = tmp_path / "other", tmp_path / "to"
    other.write_bytes(b"precious")
    meanwhile(lambda: (target / "vd0.raw").symlink_to(other))
    with pytest.raises(Error, match=r"cannot make .*vd0.raw: File exists"):
        await restore(place, target, force=force)
    assert other.read_bytes() == b"precious"
    assert [one.name for one in target.iterdir()] == ["vd0.raw"]
    assert (target / "vd0.raw").is_symlink()


async def test_a_file_under_the_name_that_it_is_to_have(place, tmp_path, meanwhile):
    target = tmp_path / "to"
    meanwhile(lambda: (target / "vd0.raw").write_bytes(b"precious"))
    with pytest.raises(Error, match=r"cannot make .*vd0.raw: File exists"):
        await restore(place, target)
    assert [one.read_bytes() for one in target.iterdir()] == [b"precious"]


async def test_an_image_that_is_written_to_meanwhile(place, tmp_path, meanwhile):
    """It has its length, and the time that it had: its digest tells, and nothing is left."""
    file = place / FULL
    data, state = bytearray(file.read_bytes()), file.stat()

    def write():
        data[-1000] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    meanwhile(lambda: None, write)
    with pytest.raises(Error, match="holds something else than it did"):
        await restore(place, tmp_path / "to")
    assert not (tmp_path / "to").exists()


async def test_an_image_of_which_only_the_rights_change_meanwhile(place, tmp_path, meanwhile):
    """It is read again, and is what it was."""
    meanwhile(lambda: None, lambda: (place / FULL).chmod(0o640))
    await restore(place, tmp_path / "to")
    assert (tmp_path / "to" / "vd0.raw").read_bytes() == WHOLE


async def test_what_has_no_name_is_not_left_where_a_second_disk_gets_none(
    place, tmp_path, meanwhile
):
    """All or none: one that has its name already goes again."""
    one = told(place, FULL)
    every = [one, replace(one, disk="vd1", path="/machine/peripheral/vd1")]
    both = replace(point("20261130T130500Z", every), number=3)
    (place / f"{both.when}.json").write_text(json.dumps(both.as_json()))
    target = tmp_path / "to"

    def put():
        (target / "vd1.raw").unlink(missing_ok=True)
        (target / "vd1.raw").write_bytes(b"precious")

    meanwhile(put)
    with pytest.raises(Error, match=r"cannot make .*vd1.raw: File exists"):
        await restore(place, target)
    assert [(one.name, one.read_bytes()) for one in target.iterdir()] == [("vd1.raw", b"precious")]


async def test_a_header_that_names_a_data_file(place, tmp_path):
    """Whoever writes the point file can have its digest be right; no such file is opened."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"\7" * SIZE)
    words = f"data_file={secret},data_file_raw=on"
    (place / FULL).unlink()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, place / FULL, SIZE)
    one = told(place, FULL)
    (place / "20261130T110500Z.json").write_text(
        json.dumps(replace(point("20261130T110500Z", [one]), number=1).as_json())
    )
    with pytest.raises(UnsupportedError, match=r"names another file, .*secret"):
        await restore(place, tmp_path / "to", at="20261130T110500Z")
    assert not (tmp_path / "to").exists()


async def test_what_is_checked_is_what_was_digested(place, tmp_path, monkeypatch):
    """A damaged image that takes a name between the two is not seen, nor is a link followed."""
    fault, seen = QemuImgCheck.fault, []

    async def exchanged(self, path, fmt, **options):
        seen.append(path)
        os.unlink(path)
        os.symlink(tmp_path / "nowhere", path)
        return await fault(self, path, fmt, **options)

    monkeypatch.setattr(QemuImgCheck, "fault", exchanged)
    made = await check_backups(place)
    assert made.points[0].faults == ()
    assert seen == [str(place / name) for name in (FULL, ABOVE)]


LUKS = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"


async def encrypted(place):
    """Have the directory hold a full backup, and an increment, of an encrypted disk."""
    secret = ("--object", "secret,id=k,data=sesame")
    every = []
    for name, pattern, start, parent in ((FULL, 1, 0, None), (ABOVE, 2, "1M", FULL)):
        path = place / name
        path.unlink()
        make = [
            "qemu-img",
            "create",
            *secret,
            "-q",
            "-f",
            "qcow2",
            "-o",
            LUKS,
            str(path),
            str(SIZE),
        ]
        await retried(lambda make=make: Tools.of(find_qemu()).run(*make))
        comma = str(path).replace(",", ",,")
        opened = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename={comma}"
        write = f"write -q -P {pattern} {start} 1M"
        run("qemu-io", *secret, "--image-opts", "-c", write, opened)
        if parent is not None:
            again = ("-b", parent, "-F", "qcow2")
            run("qemu-img", "rebase", "-u", *secret, *again, "--image-opts", opened)
        every.append(replace(told(place, name, parent), encrypted=True))
    for number, one in enumerate(every, 1):
        made = replace(point(one.file[:16], [one]), number=number)
        (place / f"{made.when}.json").write_text(json.dumps(made.as_json()))


async def test_an_encrypted_disk_is_restored_by_the_command_that_is_named(tmp_path, place):
    """It is whole, but for the file of the key; and nothing is stored in the clear."""
    place = place.rename(tmp_path / "it's, all")
    await encrypted(place)
    (tmp_path / "KEY_FILE").write_text("sesame")
    target = tmp_path / "to, here"
    with pytest.raises(UnsupportedError, match="is encrypted") as caught:
        await restore(place, target)
    assert not target.exists()
    assert caught.value.remedy is not None
    command = caught.value.remedy.partition("the same one: ")[2]
    for _ in range(TRIES):  # a QEMU that cannot time its key says so, and does it the next time
        done = subprocess.run(
            command, shell=True, check=False, cwd=tmp_path, capture_output=True, text=True
        )
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    [made] = target.iterdir()
    assert b"\1" * 512 not in made.read_bytes()
    raw, secret = tmp_path / "raw", "secret,id=k,data=sesame"
    opened = json.dumps(
        {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "k"}}
        | {"file": {"driver": "file", "filename": str(made)}}
    )
    run("qemu-img", "convert", "--object", secret, "-O", "raw", f"json:{opened}", raw)
    assert raw.read_bytes() == WHOLE


FIRST = point("20261130T110500Z", [disk("vd0", "a.qcow2"), disk("vd1", "b.qcow2")])
LAST = point("20261130T120500Z", [disk("vd0", "c.qcow2")])


@pytest.fixture
def web(tmp_path):
    with open_backups(tmp_path / "of web", make=True) as backups:
        for one in (FIRST, LAST):
            backups.make(one)
    return tmp_path / "of web"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "the newest backup before it that has that disk is 20261130T110500Z"),
        ({"at": LAST.when}, "the newest backup before it that has that disk is 20261130T110500Z"),
    ],
)
async def test_a_disk_that_the_backup_has_not(asked, said, web, tmp_path):
    """Which one has it is said, with the command that restores it."""
    with pytest.raises(NotFoundError) as refused:
        await restore(web, tmp_path / "new", disks=["vd0", "vd1"], **asked)
    lines = str(refused.value).splitlines()
    assert lines[:2] == ["the backup 20261130T120500Z has no disk vd1; it has:", "  vd0"]
    command = f"qmpblock restore '{web}' {tmp_path}/new --at {FIRST.when} --disk vd1"
    assert lines[-1] == f"Remedy: {said}: {command}"
    assert refused.value.exit_code == 2
    assert not (tmp_path / "new").exists()


async def test_a_disk_that_no_backup_has(web, tmp_path):
    with pytest.raises(NotFoundError) as refused:
        await restore(web, tmp_path / "new", disks=["vd9"])
    assert refused.value.remedy is None


async def test_where_it_is_not_restored_to(web, tmp_path):
    """--force would replace a backup of a disk that is called like one of its images."""
    link = tmp_path / "link"
    link.symlink_to(web)
    for target in (web, link):
        with pytest.raises(RequestError, match="is the directory of the backups") as caught:
            await restore(web, target, force=True)
        assert caught.value.standing == "nothing was touched"
    with pytest.raises(RequestError, match="it is empty"):
        await restore(web, "")
