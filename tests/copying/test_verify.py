"""Whether two images hold the same: every format, every way, everything that is refused."""

import os
import subprocess

import peers
import pytest

import qmpblock
from qmpblock.copying import verify as verifying
from qmpblock.copying.verify import NBDExport, opened, verify
from qmpblock.errors import (
    Error,
    NBDRequestError,
    NotFoundError,
    RequestError,
    ToolError,
    UnsupportedError,
)
from qmpblock.host.closedimage import closed_image
from qmpblock.host.qemuimgcompare import QemuImgCompare
from qmpblock.luks import retried
from qmpblock.ranges import Ranges
from qmpblock.testing.images import Tools

KIB, MIB = 1 << 10, 1 << 20
FORMATS = ("parallels", "qcow", "qcow2", "qed", "raw", "vdi", "vhdx", "vmdk", "vpc")


def run(*arguments, cwd=None):
    subprocess.run([str(one) for one in arguments], cwd=cwd, check=True, capture_output=True)


def raw(path, *pieces, size=4 * MIB):
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces:
            file.seek(at)
            file.write(data)
    return path


def poke(path, fmt, *places):
    run("qemu-io", "-f", fmt, *(f"-cwrite -P 7 {at} 1" for at in places), path)


@pytest.fixture
def source(tmp_path):
    return raw(tmp_path / "source.raw", (0, b"a" * MIB), (2 * MIB, bytes(MIB)), (3 * MIB, b"b"))


@pytest.fixture
def ways(monkeypatch):
    """Which way the images were compared: `qemu-img`, or not."""
    used = []
    real = QemuImgCompare.compare

    async def compare(self, *arguments, **options):
        used.append("qemu-img")
        return await real(self, *arguments, **options)

    monkeypatch.setattr(QemuImgCompare, "compare", compare)
    return used


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
async def test_every_format(tmp_path, source, fmt, every, ways):
    copy = tmp_path / f"copy.{'vhd' if fmt == 'vpc' else fmt}"
    options = ("-o", "force_size=on") if fmt == "vpc" else ()
    run("qemu-img", "convert", "-f", "raw", "-O", fmt, *options, source, copy)
    found = await qmpblock.verify_images(source, copy, all=every)
    assert (found.equal, found.first_difference, found.differing) == (True, None, 0)
    assert (found.sizes, found.compared) == ((4 * MIB, 4 * MIB), 4 * MIB)
    assert ways == ([] if every else ["qemu-img"])
    places = (4 * MIB - 1, 2 * MIB + 5, 64 * KIB, 0)  # the last first: it is found first to last
    for step in [places] if every else [[at] for at in places]:
        poke(copy, fmt, *step)
        found = await qmpblock.verify_images(source, copy, all=every)
        assert (found.equal, found.first_difference) == (False, step[-1])
    assert found.differing == (4 if every else None)
    assert found.unequal == (
        Ranges((at, at + 64 * KIB) for at in (0, 64 * KIB, 2 * MIB, 4 * MIB - 64 * KIB))
        if every
        else None
    )


@pytest.mark.parametrize("every", [False, True])
async def test_chains_against_one_image(tmp_path, source, every):
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(source.read_bytes())
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", "base.raw", top, cwd=tmp_path)
    assert (await qmpblock.verify_images(top, source, all=every)).equal
    poke(top, "qcow2", MIB + 3)
    found = await qmpblock.verify_images(source, top, all=every)
    assert found.first_difference == MIB + 3
    # What lies above hides it again; and a zero cluster is zeros.
    run("qemu-io", "-f", "qcow2", "-c", f"write -z {MIB} 64K", top)
    assert (await qmpblock.verify_images(source, top, all=every)).equal
    run("qemu-io", "-f", "qcow2", "-c", "write -z 64K 64K", top)
    found = await qmpblock.verify_images(source, top, all=every)
    assert (found.first_difference, found.differing) == (64 * KIB, 64 * KIB if every else None)


@pytest.mark.parametrize("every", [False, True])
async def test_sizes_that_differ(tmp_path, source, every, ways):
    longer = raw(tmp_path / "longer.raw", (0, b"a" * MIB), (3 * MIB, b"b"), size=6 * MIB)
    for pair in ((source, longer), (longer, source)):
        found = await qmpblock.verify_images(*pair, all=every)
        assert (found.equal, found.first_difference, found.compared) == (False, None, 0)
        assert sorted(found.sizes) == [4 * MIB, 6 * MIB]
        assert not ways  # nothing was read
        found = await qmpblock.verify_images(*pair, longer="zeros", all=every)
        assert (found.equal, found.compared) == (True, 6 * MIB)
        ways.clear()
    poke(longer, "raw", 6 * MIB - 1)
    found = await qmpblock.verify_images(source, longer, longer="zeros", all=every)
    assert found.first_difference == 6 * MIB - 1
    found = await qmpblock.verify_images(source, longer, longer="any", all=every)
    assert (found.equal, found.compared) == (True, 4 * MIB)
    poke(longer, "raw", 4 * MIB - 1)
    found = await qmpblock.verify_images(source, longer, longer="any", all=every)
    assert found.first_difference == 4 * MIB - 1
    with pytest.raises(RequestError, match="'some' is none of no, zeros, any"):
        await qmpblock.verify_images(source, longer, longer="some")


async def test_formats_are_given_or_told_by_the_name(tmp_path, source):
    nameless = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, nameless)
    with pytest.raises(RequestError, match="does not tell the image's format"):
        await qmpblock.verify_images(source, nameless)
    assert (await qmpblock.verify_images(source, nameless, second_format="qcow2")).equal
    assert (await qmpblock.verify_images(nameless, source, format="qcow2")).equal
    found = await qmpblock.verify_images(source, nameless, second_format="raw", longer="zeros")
    assert found.first_difference == 0
    with pytest.raises(NotFoundError):
        await qmpblock.verify_images(source, tmp_path / "none.raw")


@pytest.mark.parametrize(("every", "error"), [(False, ToolError), (True, NBDRequestError)])
async def test_what_cannot_be_read_is_no_difference(tmp_path, source, every, error):
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, copy)
    data = bytearray(copy.read_bytes())
    table = int.from_bytes(data[40:48], "big")  # of level 1
    entries = int.from_bytes(data[table : table + 8], "big") & ~(1 << 63)
    data[entries : entries + 8] = (1 << 63 | 0x50200).to_bytes(8, "big")  # not where clusters are
    copy.write_bytes(data)
    with pytest.raises(error):
        await qmpblock.verify_images(source, copy, all=every)


@pytest.mark.parametrize("every", [False, True])
async def test_encrypted_ones_need_a_key(tmp_path, source, every):
    locked = tmp_path / "locked.luks"
    secret = ("--object", "secret,id=s,data=x")
    options = ("-o", "key-secret=s,iter-time=10")
    tools = Tools.of()
    words = ("create", "-f", "luks", *secret, *options, str(locked), "4M")
    await retried(lambda: tools.run(tools.img, *words))
    with pytest.raises(UnsupportedError, match="is encrypted") as caught:
        await qmpblock.verify_images(source, locked, all=every)
    assert "--format raw" in str(caught.value.remedy)
    found = await qmpblock.verify_images(
        locked, locked, format="raw", second_format="raw", all=every
    )
    assert found.equal


@pytest.mark.parametrize("every", [False, True])
async def test_an_image_that_is_written_to_meanwhile(tmp_path, source, monkeypatch, every):
    copy = raw(tmp_path / "copy.raw", (0, source.read_bytes()))
    done = []

    def tell(seen):
        if not done:
            done.append(copy.write_bytes(source.read_bytes()))

    with pytest.raises(Error, match="was written to, or replaced, while it was read"):
        await qmpblock.verify_images(source, copy, all=every, progress=tell)


async def test_a_difference_that_is_gone_at_another_look(tmp_path, source, monkeypatch):
    async def lies(self, *images, progress):
        return 512

    monkeypatch.setattr(QemuImgCompare, "compare", lies)
    with pytest.raises(Error, match="found a difference at offset 512, and another look did not"):
        await qmpblock.verify_images(source, source)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy")
async def test_images_of_two_owners_are_each_read_with_their_owners_rights(tmp_path, ways):
    tmp_path.chmod(0o755)
    one, other = raw(tmp_path / "one.raw", (5, b"x")), raw(tmp_path / "other.raw", (5, b"x"))
    for path, uid in ((one, 61666), (other, 64055)):
        path.chmod(0o600)
        os.chown(path, uid, uid)
    assert (await qmpblock.verify_images(one, other)).equal
    assert ways == []
    poke(other, "raw", MIB)
    found = await qmpblock.verify_images(one, other)
    assert (found.first_difference, found.differing) == (MIB, None)
    os.chown(other, 61666, 61666)
    assert (await qmpblock.verify_images(one, other)).first_difference == MIB
    assert ways == ["qemu-img"]


async def test_an_export_against_an_image(tmp_path, source):
    copy = raw(tmp_path / "copy.raw", (0, source.read_bytes()))
    socket = tmp_path / "nbd"
    command = ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(socket), "-x", "point", str(source)]
    with peers.running(command, socket):
        export = NBDExport(str(socket), "point")
        image = await closed_image(copy)
        seen = []
        assert (await verify(export, image, progress=seen.append)).equal
        assert seen[-1].done == 4 * MIB
        poke(copy, "raw", 3 * MIB + 1)
        assert (await verify(image, export)).first_difference == 3 * MIB + 1
        async with opened(export) as client:  # one that somebody has stays open
            found = await verify(client, image, all=True)
            assert (found.first_difference, found.differing) == (3 * MIB + 1, 1)
            assert await client.read(0, 1) == b"a"


def test_the_ways_to_be_longer_are_those_of_the_command():
    assert verifying.Longer.__args__ == verifying._LONGER
