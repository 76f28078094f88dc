"""Closed images, by qemu-img, and never by probing."""

import asyncio
import errno
import json
import os
import shutil
import subprocess

import pytest
from rounds import rounds

from qmpblock.errors import Error, NotFoundError, RequestError, ToolError, UnsupportedError
from qmpblock.host import confined
from qmpblock.host.contents import Contents
from qmpblock.host.handed import HandedFiles
from qmpblock.host.imagechain import blockdev, format_of
from qmpblock.host.qemuimg import Key, QemuImg
from qmpblock.host.toolwords import in_use_by_another, lacks_key, lacks_space

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not here")


def create(*arguments, cwd):
    subprocess.run(["qemu-img", "create", "-q", *arguments], cwd=cwd, check=True)


@pytest.mark.parametrize(
    ("name", "fmt"), [("a.qcow2", "qcow2"), ("/x/B.IMG", "raw"), ("c.vhd", "vpc")]
)
def test_the_name_tells_the_format(name, fmt):
    assert format_of(name) == fmt


@pytest.mark.parametrize("name", ["noname", "x.iso9660", "/dir.qcow2/disk"])
def test_or_it_does_not(name):
    with pytest.raises(RequestError, match="forge"):
        format_of(name)


async def test_a_chain_is_followed_by_what_is_recorded(tmp_path):
    create("-f", "raw", "base.raw", "4M", cwd=tmp_path)
    create("-f", "qcow2", "-F", "raw", "-b", "base.raw", "middle.qcow2", "3M", cwd=tmp_path)
    create("-f", "qcow2", "-F", "qcow2", "-b", "middle.qcow2", "top.qcow2", "5M", cwd=tmp_path)
    images = await QemuImg().chain(str(tmp_path / "top.qcow2"), "qcow2")
    assert [(i.file.rsplit("/", 1)[1], i.format, i.size >> 20) for i in images] == [
        ("top.qcow2", "qcow2", 5),
        ("middle.qcow2", "qcow2", 3),
        ("base.raw", "raw", 4),
    ]
    found = await QemuImg().map(
        blockdev(images[0].format, images[0].file, images[1:]), [i.format for i in images]
    )
    assert found.layers == 3


def counted(monkeypatch):
    """Return the list of the runs of qemu-img, by what they do."""
    runs, real = [], QemuImg._run

    def run(self, arguments, *rest, **named):
        runs.append(arguments[0])
        return real(self, arguments, *rest, **named)

    monkeypatch.setattr(QemuImg, "_run", run)
    return runs


async def test_headers_say_what_qemu_img_does(tmp_path, monkeypatch):
    """All plain qcow2 images of a chain by one process, the rest by qemu-img, one by one."""
    (tmp_path / "in").mkdir()
    create("-f", "raw", "base.raw", "3M", cwd=tmp_path)
    below, fmt = "base.raw", "raw"
    for number, options in enumerate(
        ("compat=0.10", "compat=1.1,cluster_size=512", "cluster_size=2M,extended_l2=on", "")
    ):
        name = f"in/a b=ü{number}.qcow2"
        words = ["-o", options] if options else []
        named = f"../{below}" if number == 0 else below.rpartition("/")[2]
        create("-f", "qcow2", *words, "-F", fmt, "-b", named, name, f"{number + 4}M", cwd=tmp_path)
        below, fmt = name, "qcow2"
    monkeypatch.chdir(tmp_path)
    runs = counted(monkeypatch)
    for name in (below, tmp_path / below, f"in/../{below}"):
        runs.clear()
        expected = await QemuImg().chain(str(name), "qcow2")
        assert runs == ["info"] * 5
        runs.clear()
        assert await QemuImg().chain(str(name), "qcow2", by_headers=True) == expected
        assert runs == ["info"] * 2
        assert [one.size >> 20 for one in expected] == [7, 6, 5, 4, 3]


async def test_where_a_link_leads_counts_and_not_how_its_name_is_written(tmp_path):
    """`x/../top` is not `top` where x is a link."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    for where, size in ((tmp_path, "1M"), (tmp_path / "far", "2M")):
        create("-f", "qcow2", "base.qcow2", size, cwd=where)
        create("-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2", cwd=where)
    (tmp_path / "x").symlink_to("far/deep")
    name = f"{tmp_path}/x/../top.qcow2"
    found = await QemuImg().chain(name, "qcow2", by_headers=True)
    assert [one.size >> 20 for one in found] == [2, 2]
    assert found == await QemuImg().chain(name, "qcow2")


@pytest.mark.parametrize(
    "spoil",
    [
        "no backing format",
        "a data file",
        "a fifo below",
        "nothing below",
        "a link to itself",
        "a format that is none",
        "a name with a line in it",
        "corrupt",
        "described",
        "cut",
    ],
)
async def test_what_is_not_plain_is_asked_of_qemu_img(tmp_path, spoil):
    create("-f", "qcow2", "base.qcow2", "1M", cwd=tmp_path)
    top, base = tmp_path / "top.qcow2", tmp_path / "base.qcow2"
    below, fmt = "base.qcow2", "qcow2"
    if spoil == "a name with a line in it":
        below = "ba\nse.qcow2"
        base.rename(tmp_path / below)
    elif spoil == "described":
        below = "json:" + json.dumps(blockdev("qcow2", str(base)))
    words = ["-F", fmt, "-b", below]
    if spoil == "a data file":
        words += ["-o", "data_file=data"]
    create("-u", "-f", "qcow2", *words, "top.qcow2", "1M", cwd=tmp_path)
    header = bytearray(top.read_bytes())
    if spoil == "no backing format":
        header[:] = header.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78")
    elif spoil == "a format that is none":
        header[:] = header.replace(b"\0\0\0\x05qcow2", b"\0\0\0\x05qqqqq")
    elif spoil == "corrupt":
        header[79] |= 2
    elif spoil == "cut":
        del header[90:]
    top.write_bytes(header)
    if spoil in ("a fifo below", "nothing below", "a link to itself"):
        base.unlink()
    if spoil == "a fifo below":
        os.mkfifo(base)
    if spoil == "a link to itself":
        base.symlink_to("base.qcow2")

    async def end(*, by_headers):
        try:
            return await QemuImg().chain(str(top), "qcow2", by_headers=by_headers)
        except Error as error:
            return type(error), str(error), error.remedy

    assert await end(by_headers=True) == await end(by_headers=False)


def test_any_header_is_read_as_qemu_img_reads_it(tmp_path):
    """Or not at all. A sample by chance."""
    count, chance = rounds(60)
    create("-f", "qcow2", "-u", "-F", "raw", "-b", "base.raw", "top.qcow2", "1M", cwd=tmp_path)
    top = tmp_path / "top.qcow2"
    whole = top.read_bytes()
    end = whole.index(b"base.raw") + 16
    taken = 0
    for _ in range(count):
        header = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.choice([chance.randrange(104), chance.randrange(end)])
            header[at] = chance.choice([0, 1, 2, 8, 255, header[at] ^ 1 << chance.randrange(8)])
        for cut in (chance.randrange(end), chance.randrange(104)):
            confined._says(bytes(header[:cut]))
        found = confined._says(bytes(header))
        if found is None:
            continue
        top.write_bytes(header)
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", "qcow2", top],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            continue  # whoever maps it hears that
        taken += 1
        said = json.loads(done.stdout)
        told = (said.get(key, "") for key in ("backing-filename", "backing-filename-format"))
        assert found == (said["virtual-size"], *map(os.fsencode, told))
    assert taken


async def test_a_raw_image_is_not_opened_as_what_it_pretends_to_be(tmp_path):
    """A guest can write a qcow2 header, with a backing file of its choice, on its raw disk."""
    create("-f", "raw", "secret.raw", "1M", cwd=tmp_path)
    create("-f", "qcow2", "-F", "raw", "-b", "secret.raw", "disk.raw", cwd=tmp_path)
    [image] = await QemuImg().chain(str(tmp_path / "disk.raw"), "raw")
    assert image.format == "raw"
    assert image.size < 1 << 20  # its own bytes, not the disk that the header speaks of


async def test_a_backing_format_that_nothing_tells_is_refused(tmp_path):
    create("-f", "raw", "base", "1M", cwd=tmp_path)
    create("-f", "qed", "-F", "raw", "-b", "base", "top.qed", cwd=tmp_path)
    create("-f", "qcow", "-F", "raw", "-b", "base", "top.qcow", cwd=tmp_path)
    with pytest.raises(UnsupportedError, match="does not record") as caught:
        await QemuImg().chain(str(tmp_path / "top.qcow"), "qcow")
    assert "rebase -u" in caught.value.remedy


async def test_a_missing_image_is_named(tmp_path):
    create("-f", "raw", "base.raw", "1M", cwd=tmp_path)
    create("-f", "qcow2", "-F", "raw", "-b", "base.raw", "top.qcow2", cwd=tmp_path)
    (tmp_path / "base.raw").unlink()
    with pytest.raises(NotFoundError, match=r"backing file of .*top\.qcow2"):
        await QemuImg().chain(str(tmp_path / "top.qcow2"), "qcow2")


async def test_a_chain_that_bites_its_tail_ends(tmp_path):
    for name, below in (("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")):
        create("-u", "-f", "qcow2", "-F", "qcow2", "-b", below, name, "1M", cwd=tmp_path)
    with pytest.raises(RequestError, match="own backing chain"):
        await QemuImg().chain(str(tmp_path / "a.qcow2"), "qcow2")


async def test_a_remote_backing_file_is_refused(tmp_path):
    create("-u", "-f", "qcow2", "-F", "raw", "-b", "nbd://host/x", "a.qcow2", "1M", cwd=tmp_path)
    with pytest.raises(UnsupportedError, match="not a local file"):
        await QemuImg().chain(str(tmp_path / "a.qcow2"), "qcow2")


async def test_a_backing_file_that_is_described(tmp_path):
    whole = tmp_path / "whole"
    whole.write_bytes(bytes(1 << 20) + b"\x01" * (1 << 20))
    file = {"driver": "file", "filename": str(whole)}
    part = "json:" + json.dumps({"driver": "raw", "offset": 1 << 20, "size": 1 << 20, "file": file})
    create("-f", "qcow2", "-F", "raw", "-b", part, "top.qcow2", cwd=tmp_path)
    images = await QemuImg().chain(str(tmp_path / "top.qcow2"), "qcow2")
    assert [(image.format, image.size) for image in images] == [
        ("qcow2", 1 << 20),
        ("raw", 1 << 20),
    ]
    found = await QemuImg().map(
        blockdev(images[0].format, images[0].file, images[1:]), [image.format for image in images]
    )
    assert found.where(depth=1, data=True).total == 1 << 20
    whole.unlink()
    with pytest.raises(NotFoundError, match="backing file of"):
        await QemuImg().chain(str(tmp_path / "top.qcow2"), "qcow2")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}',
        'json:{"file":{"driver":"file","filename":"/dev/null"}}',
        "json:[]",
        "json:[",
    ],
)
async def test_a_description_that_does_not_do(name, tmp_path):
    """Of something remote; of what would have to be probed; of nothing."""
    create("-u", "-f", "qcow2", "-F", "raw", "-b", name, "a.qcow2", "1M", cwd=tmp_path)
    with pytest.raises(UnsupportedError, match=r"not a local file|does not record"):
        await QemuImg().chain(str(tmp_path / "a.qcow2"), "qcow2")


async def test_a_wrong_format_is_qemu_imgs_error(tmp_path):
    (tmp_path / "a.qcow2").write_bytes(b"nonsense" * 100)
    with pytest.raises(ToolError, match="qcow2") as caught:
        await QemuImg().chain(str(tmp_path / "a.qcow2"), "qcow2")
    assert caught.value.returncode == 1


async def test_no_qemu_img_says_what_to_install(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"")
    with pytest.raises(ToolError) as caught:
        await QemuImg("no-such-qemu-img").chain(str(tmp_path / "a.raw"), "raw")
    assert "install" in caught.value.remedy


def test_contents_are_written_where_they_were(tmp_path):
    contents = Contents(20000, ((0, b"head"), (8192, b"x" * 5000)))
    with (tmp_path / "image").open("w+b") as file:
        contents.write_to(file.fileno())
        file.seek(0)
        data = file.read()
        again = Contents.of(file.fileno())
    assert len(data) == 20000
    assert data[:5] == b"head\0"
    assert data[8192:13193] == b"x" * 5000 + b"\0"
    assert again.length == 20000
    for at, piece in again.pieces:
        assert data[at : at + len(piece)] == piece
    with (tmp_path / "empty").open("w+b") as file:
        assert Contents.of(file.fileno()) == Contents(0, ())


async def test_an_image_is_made_in_memory(tmp_path):
    options = {"cluster_size": 4096}
    made = await QemuImg().create("qcow2", 1 << 30, options, backing=("-b,c=d", "raw"))
    with (tmp_path / "image").open("wb") as file:
        made.write_to(file.fileno())
    seen = subprocess.check_output(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", tmp_path / "image"]
    )
    info = json.loads(seen)
    assert info["virtual-size"] == 1 << 30
    assert info["cluster-size"] == 4096
    assert (info["backing-filename"], info["backing-filename-format"]) == ("-b,c=d", "raw")


async def test_a_key_is_in_no_error():
    key = Key(b"c2VzYW1l!", "base64")  # it is no base64
    with pytest.raises(ToolError) as caught:
        await QemuImg().create("luks", 1 << 20, {"key-secret": "key0"}, keys=[key])
    assert "c2VzYW1l" not in str(caught.value) + repr(caught.value.command) + repr(key)
    assert "invalid characters" in caught.value.stderr


async def test_what_qemu_img_says_of_its_own_file_is_left_out():
    with pytest.raises(ToolError) as caught:
        await QemuImg().create("luks", 1 << 20, {"key-secret": "key0"}, keys=[Key(b"\xff")])
    assert "UTF-8" in caught.value.stderr
    assert "deleting" not in caught.value.stderr


@pytest.mark.parametrize(
    ("said", "held"),
    [
        ("Could not open 'a': Failed to get shared \"write\" lock\nIs another process", True),
        ('Failed to get "consistent read" lock', True),
        ("Failed to lock byte 100: Resource temporarily unavailable", True),
        ("Could not open '/srv/qmpblock/a': Permission denied", False),
    ],
)
def test_who_holds_an_image_is_told_by_qemus_words_and_not_by_a_name(said, held):
    assert in_use_by_another(said) is held


def test_an_image_whose_key_nobody_gave_is_told_by_qemus_words(tmp_path):
    """One of the old cipher: to make its header takes no time."""
    key = ("--object", "secret,id=k,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=k")
    create("-f", "qcow2", *key, "locked.qcow2", "1M", cwd=tmp_path)
    command = ["qemu-img", "map", "-f", "qcow2", "locked.qcow2"]
    asked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert asked.returncode == 1
    assert lacks_key(asked.stderr)
    assert not lacks_space(asked.stderr)
    assert not in_use_by_another(asked.stderr)


def test_no_space_is_told_by_the_words_of_the_system():
    said = f"qemu-img: error while writing at byte 0: {os.strerror(errno.ENOSPC)}"
    assert lacks_space(said)
    assert not lacks_key(said)


GOOD = '{"start": 0, "length": 512, "depth": 0, "present": true, "zero": false, "data": true}'


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "there is no map"),
        ("no map\n", "Expecting value"),
        ('{"a": ' * 20_000, "recursion"),
        ("[{}]", "present"),
        (f"[{GOOD}", None),
        (f"[{GOOD.replace('true', '1')}]", "has the present 1"),
        (f"[{GOOD.replace('512', '9' * 5000)}]", "limit"),
        (f"[{GOOD.replace('512', '-1')}]", "length -1"),
        (f"[{GOOD},\n{GOOD}]", "not contiguous"),
        (f"[{GOOD.replace('0, ', '7, ').replace('7', '0', 1)}]", "outside the 1 layers"),
        ("7\n", "not a list of records"),
    ],
)
async def test_a_map_that_is_none(tmp_path, said, why):
    """A broken program fails as a program does: nobody's request was wrong."""
    program, image = tmp_path / "qemu-img", tmp_path / "a.raw"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    program.chmod(0o755)
    image.write_bytes(bytes(512))
    mapping = QemuImg(str(program)).map(blockdev("raw", str(image)), ["raw"])
    if why is None:
        assert (await mapping).stop == 512
        return
    with pytest.raises((ToolError, UnsupportedError), match=why) as caught:
        await mapping
    assert isinstance(caught.value, ToolError) or why == "present"


async def test_one_that_talks_on_is_not_waited_for(tmp_path):
    """Whoever leaves it does so before it has said all, and nobody reads that any more."""
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\nwhile :; do printf '%065536d\\n' 0; done\n")
    program.chmod(0o755)
    with HandedFiles() as files:
        run = QemuImg(str(program))._run(["map"], files)
        async with asyncio.timeout(120):
            async for _ in run:
                await asyncio.sleep(0.5)  # it has said more than is kept for a reader
                break
            await run.aclose()


async def test_a_script_that_starts_another_program_is_told(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "qemu-img"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {tmp_path}/elsewhere/qemu-img\n")
    program.chmod(0o755)
    (tmp_path / "a.raw").write_bytes(bytes(512))
    with pytest.raises(ToolError) as caught:
        await QemuImg(str(program)).chain(str(tmp_path / "a.raw"), "raw")
    assert caught.value.returncode in (126, 127)
    assert "a link to it" in caught.value.remedy
