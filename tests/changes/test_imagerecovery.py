"""Images after QEMU died in the middle of a change: real images, and no QEMU."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from drawing import MIB, RUN, record
from headers_of_eve import EVE, Place, in_file, with_data_file
from journaling import as_format_1

from qmpblock.changes.imagerecovery import recover_images, recover_journal
from qmpblock.changes.journal import Journal
from qmpblock.changes.record import VMIdentity
from qmpblock.changes.survey import journals
from qmpblock.errors import BusyError, Error, NotFoundError, ToolError, UnsupportedError
from qmpblock.graph.jsonname import as_text
from qmpblock.host.processes import boot_id, start_time
from qmpblock.luks import retried
from qmpblock.testing.images import Tools, find_qemu

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not here",
)


def tool(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def create(path, backing=None, *, base_format="qcow2", fmt="qcow2", size=16 * MIB):
    under = ["-F", base_format, "-b", str(backing)] if backing else []
    tool("qemu-img", "create", "-q", "-f", fmt, *under, str(path), str(size))


def write(path, pattern, offset=0, fmt="qcow2"):
    """Write a megabyte of one byte."""
    done = tool("qemu-io", "-f", fmt, "-c", f"write -P {pattern} {offset} 1M", str(path))
    assert "wrote 1048576" in done


def holds(path, pattern, offset=0, fmt="qcow2"):
    """Whether there is a megabyte of this byte."""
    done = tool("qemu-io", "-f", fmt, "-c", f"read -P {pattern} {offset} 1M", str(path))
    assert "read 1048576" in done
    return "verification failed" not in done


def contents(directory):
    """Return what every file there holds."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def state(tmp_path, monkeypatch):
    where = tmp_path / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


@pytest.fixture
def disk(tmp_path, state):
    """Return the active image: a base with 1 in its first megabyte, and 2 in its third."""
    path = tmp_path / "disk.qcow2"
    create(path)
    write(path, 1)
    write(path, 2, 2 * MIB)
    return path


def made(journal, path, fmt="qcow2"):
    """Say in the journal that a file was made, and its header written."""
    status = path.stat()
    journal.add(made=str(path), dev=status.st_dev, ino=status.st_ino)
    if fmt:
        journal.add(created=str(path), format=fmt)


class Staging:
    """A staged commit of `disk`, broken off while its overlay was there."""

    def __init__(self, disk, *, header=True, base_format="qcow2"):
        self.disk = disk
        self.overlay = disk.with_name(f"{disk.name}.qmpblock-{RUN}")
        self.zeros = disk.with_name(f"{disk.name}.qmpblock-{RUN}-z")
        self.record = record(
            operation="allocate",
            pivot=True,
            job=f"qmpblock-{RUN}-pivot",
            top=f"qmpblock-{RUN}-0",
            top_file=str(self.overlay),
            base="d0",
            base_file=str(disk),
            base_format=base_format,
            nodes=(f"qmpblock-{RUN}-0",),
            files=(str(self.overlay), str(self.zeros)),
            images=(str(disk),),
        )
        self.journal = Journal.create(self.record, disk)
        self.journal.add(pivoted=False)
        if header:
            create(self.overlay, disk.name, base_format=base_format)
        else:
            self.overlay.write_bytes(b"")
        made(self.journal, self.overlay, "qcow2" if header else "")

    def ours(self):
        """Return what is left of it."""
        return [path for path in self.disk.parent.iterdir() if "qmpblock" in path.name]


@pytest.fixture
def staging(disk):
    return Staging(disk)


async def test_nothing_happened(disk):
    assert await recover_images([disk]) == []


async def test_there_is_no_such_image(disk):
    with pytest.raises(NotFoundError) as caught:
        await recover_images([disk, disk.with_name("nosuch\x1b")])
    assert caught.value.exit_code == 2
    assert "\x1b" not in str(caught.value)


async def test_what_the_guest_wrote_last_is_brought_home(staging, disk, state):
    write(staging.overlay, 9)
    (found,) = await recover_images([disk])
    assert found.verdict.start == (str(disk),)
    assert found.verdict.commit == ((str(staging.overlay), str(disk)),)
    assert holds(disk, 9)
    assert holds(disk, 2, 2 * MIB)
    assert staging.ours() == []
    assert list(state.glob("*.journal")) == []
    assert "committed into" in found.describe()
    assert await recover_images([disk]) == []


async def test_zeros_that_were_made_for_it_go_too(staging, disk):
    """They are not part of the guest's data: the overlay's header never names them."""
    create(staging.zeros)
    write(staging.zeros, 0, 2 * MIB)
    made(staging.journal, staging.zeros, "")
    write(staging.overlay, 9)
    (found,) = await recover_images([disk])
    assert found.removed == (str(staging.zeros),)
    assert holds(disk, 2, 2 * MIB)
    assert staging.ours() == []


async def test_a_stale_overlay_is_never_committed(staging, disk):
    """Facts 10.3: the guest was back on the image, and has overwritten it since."""
    write(staging.overlay, 9)
    staging.journal.mark(pivoted=True)
    write(disk, 7)
    (found,) = await recover_images([disk])
    assert holds(disk, 7)
    assert found.removed == (str(staging.overlay),)
    assert staging.ours() == []


async def test_a_pivot_that_failed_after_all_leaves_the_overlay_newest(staging, disk):
    staging.journal.mark(pivoted=True)
    staging.journal.mark(pivoted=False)
    write(staging.overlay, 9)
    await recover_images([disk])
    assert holds(disk, 9)


@pytest.mark.parametrize("header", [True, False])
async def test_an_overlay_that_holds_nothing_goes(disk, header):
    staging = Staging(disk, header=header)
    before = contents(disk.parent)[str(disk)]
    (found,) = await recover_images([disk])
    assert found.removed == (str(staging.overlay),)
    assert staging.ours() == []
    assert contents(disk.parent)[str(disk)] == before


async def test_a_file_of_the_next_slice_has_no_header_yet(staging, disk):
    """The one of that name that had one was another."""
    kept = staging.overlay.rename(staging.overlay.with_name("keeps-its-inode"))
    staging.overlay.write_bytes(b"")
    made(staging.journal, staging.overlay, "")
    (found,) = await recover_images([disk])
    assert found.removed == (str(staging.overlay),)
    assert kept.exists()


async def test_without_the_overlay_there_is_nothing_to_do(staging, disk):
    staging.overlay.unlink()
    (found,) = await recover_images([disk])
    assert found.removed == ()
    assert staging.ours() == []


async def test_another_file_of_that_name_is_not_touched(staging, disk):
    """It has our name, and somebody else made it."""
    staging.overlay.rename(staging.overlay.with_name("moved"))
    staging.overlay.write_text("precious")
    await recover_images([disk])
    assert staging.overlay.read_text() == "precious"


async def test_a_dry_run_changes_nothing(staging, disk, tmp_path):
    write(staging.overlay, 9)
    before = contents(tmp_path)
    (found,) = await recover_images([disk], dry_run=True)
    assert found.verdict.commit
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", ["gone", "writable for others"])
async def test_without_the_word_beside_the_image_nothing_is_done_by_format_1(
    staging, disk, tmp_path, how
):
    """It alone says whether the overlay is stale."""
    write(staging.overlay, 9)
    staging.journal.mark(pivoted=True)
    as_format_1(staging.journal)
    home = staging.journal.paths[1]
    if how == "gone":
        home.unlink()
    else:
        home.chmod(0o666)
    before = contents(tmp_path)
    with pytest.raises(Error, match="is newer cannot be told") as caught:
        await recover_images([disk])
    assert str(home) in caught.value.remedy
    assert contents(tmp_path) == before


async def test_a_base_whose_chain_would_have_to_be_guessed_is_not_committed_to(tmp_path, state):
    """A guest can forge a format (safety rule 3)."""
    lowest, disk = tmp_path / "lowest", tmp_path / "disk.qed"
    create(lowest)
    create(disk, lowest, fmt="qed")  # whose header does not say what its backing image is
    staging = Staging(disk, base_format="qed")
    write(staging.overlay, 9)
    before = contents(tmp_path)
    with pytest.raises(UnsupportedError):
        await recover_images([disk])
    assert contents(tmp_path) == before


class Opened:
    """An image that some process has open for writing."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.process = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process.stdin.write("length\n")
        self.process.stdin.flush()
        while "MiB" not in self.process.stdout.readline():
            assert self.process.poll() is None, "qemu-io ended"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("which", ["overlay", "disk"])
async def test_an_image_that_is_in_use_is_left_as_it_is(staging, disk, which):
    """The VM was started again, from the wrong image."""
    write(staging.overlay, 9)
    with Opened(getattr(staging, which)), pytest.raises(ToolError, match="lock"):
        await recover_images([disk])
    assert holds(staging.overlay, 9)
    assert holds(disk, 1)
    (found,) = await recover_images([disk])  # it can be done afterwards
    assert found.verdict.commit
    assert holds(disk, 9)


@pytest.mark.parametrize("dry_run", [True, False])
async def test_while_its_qemu_runs_nothing_is_touched(staging, disk, tmp_path, dry_run):
    pid = os.getpid()
    alive = VMIdentity("vm", "u", pid, start_time(pid), boot_id(), "unix:/run/vm.qmp")
    write(staging.overlay, 9)
    staging.journal.remove()
    Journal.create(replace(staging.record, vm=alive), disk)
    before = contents(tmp_path)
    with pytest.raises(BusyError, match=f"process {pid}") as caught:
        await recover_images([disk], dry_run=dry_run)
    assert "qmpblock recover unix:/run/vm.qmp" in caught.value.remedy
    assert contents(tmp_path) == before


async def test_any_image_of_it_finds_it(staging, disk, tmp_path, monkeypatch):
    """By another name, too: a link, or relative."""
    link = tmp_path / "link"
    link.symlink_to(disk)
    monkeypatch.chdir(tmp_path)
    for name in (link, disk.name, staging.overlay):
        assert len(await recover_images([name], dry_run=True)) == 1


async def test_an_image_that_only_the_vm_saw_under_its_name(disk, state):
    """QEMU had mounts of its own, and the way through its process ended with it."""
    inside = f"/proc/{1 << 30}/root/{disk.name}"
    Journal.create(
        record(
            operation="commit",
            pivot=True,
            job=f"qmpblock-{RUN}-pivot",
            top_file=inside,
            base_file="/proc/1/root/base",
            images=(inside, "/proc/1/root/base"),
        )
    ).mark(pivoted=True)
    (found,) = await recover_images([disk], dry_run=True)
    assert found.verdict.stale == (inside,)
    other = disk.with_name(f"x{disk.name}")
    create(other)
    assert await recover_images([other], dry_run=True) == []


async def test_other_images_are_safe(staging, disk):
    other = disk.with_name("other.qcow2")
    create(other)
    assert await recover_images([other]) == []
    assert staging.overlay.exists()


# snapshots


@pytest.fixture
def snapped(disk):
    """Return two overlays of a snapshot that was broken off, and its record's journal."""
    second = disk.with_name("second.qcow2")
    create(second)
    overlays = [disk.with_name("new0"), disk.with_name("new1")]
    wanted = record(
        operation="snapshot",
        devices=("/machine/peripheral/vd0", "/machine/peripheral/vd1"),
        names=("vd0", "vd1"),
        files=tuple(map(str, overlays)),
        images=(str(disk), str(second)),
    )
    journal = Journal.create(wanted)
    for overlay, below in zip(overlays, (disk, second), strict=True):
        create(overlay, below.name)
        made(journal, overlay)
    return overlays


async def test_overlays_of_a_snapshot_that_was_not_taken_go(snapped, disk):
    (found,) = await recover_images([disk])
    assert found.verdict.start == (str(disk), str(disk.with_name("second.qcow2")))
    assert not any(path.exists() for path in snapped)


@pytest.mark.parametrize("which", [0, 1])
async def test_overlays_that_were_written_to_stay_all(snapped, disk, which):
    """They are one point in time: also the one that holds nothing yet."""
    write(snapped[which], 5)
    (found,) = await recover_images([disk])
    assert found.verdict.start == tuple(map(str, snapped))
    assert found.removed == ()
    assert all(path.exists() for path in snapped)
    assert list(journals()) == []
    assert await recover_images([snapped[0]]) == []


async def test_an_overlay_that_is_in_use_cannot_be_judged(snapped, disk):
    """The VM was started from it: afterwards it may hold everything."""
    with Opened(snapped[0]), pytest.raises(ToolError, match="lock"):
        await recover_images([disk])
    assert len(list(journals())) == 1
    assert all(path.exists() for path in snapped)


async def test_an_overlay_that_cannot_be_read_counts_as_written(snapped, disk):
    """An encrypted one, say; here one whose header is torn."""
    snapped[0].write_bytes(b"QFI\xfb torn")
    # The same inode: it is the file that was made.
    (found,) = await recover_images([disk])
    assert found.removed == ()
    assert snapped[0].exists()


# commits


@pytest.fixture
def committing(disk):
    """Return the overlay of an active commit into `disk` that was broken off, and the journal."""
    overlay = disk.with_name("overlay.qcow2")
    create(overlay, disk.name)
    write(overlay, 9)
    wanted = record(
        operation="commit",
        pivot=True,
        job=f"qmpblock-{RUN}-pivot",
        top="d0",
        top_file=str(overlay),
        base="d1",
        base_file=str(disk),
        images=(str(overlay), str(disk)),
    )
    return overlay, Journal.create(wanted, overlay)


@pytest.mark.parametrize("pivoted", [True, False])
async def test_which_image_to_start_from_after_a_commit(committing, disk, tmp_path, pivoted):
    """No image of the user's is changed, nor removed."""
    overlay, journal = committing
    if pivoted:
        journal.mark(pivoted=True)
    before = contents(tmp_path)
    (found,) = await recover_images([disk])
    assert found.verdict.start == (str(disk if pivoted else overlay),)
    assert found.verdict.stale == ((str(overlay),) if pivoted else ())
    assert ("Never use" in found.describe()) is pivoted
    gone = {str(path) for path in journal.paths}
    assert contents(tmp_path) == {p: c for p, c in before.items() if p not in gone}


@pytest.mark.parametrize("how", ["gone", "writable for others"])
async def test_what_happens_beside_the_image_is_no_matter_to_the_state_directory(
    committing, disk, how
):
    overlay, journal = committing
    journal.mark(pivoted=True)
    if how == "gone":
        journal.paths[1].unlink()
    else:
        journal.paths[1].chmod(0o666)
    (found,) = await recover_images([overlay], dry_run=True)
    assert found.verdict.start == (str(disk),)
    assert found.verdict.stale == (str(overlay),)


async def test_without_the_word_beside_its_image_a_commit_of_format_1_is_not_judged(
    committing, disk
):
    """It would send the operator to a stale overlay."""
    _, journal = committing
    journal.mark(pivoted=True)
    as_format_1(journal)
    journal.paths[1].unlink()
    with pytest.raises(Error, match="is newer cannot be told"):
        await recover_images([disk])
    assert journal.paths[0].exists()


@pytest.mark.usefixtures("state")
async def test_a_commit_on_another_host_has_one_journal():
    """The image is not here, and never was: what was marked was marked there."""
    elsewhere = record(
        operation="commit", pivot=True, top_file="/elsewhere/top", base_file="/elsewhere/base"
    )
    only = Journal.create(elsewhere)
    assert (await recover_journal(only, dry_run=True)).verdict.stale == ()
    only.mark(pivoted=True)
    (again,) = journals()
    assert (await recover_journal(again)).verdict.start == ("/elsewhere/base",)


async def test_a_stream_leaves_the_chain_whole(disk):
    overlay = disk.with_name("overlay.qcow2")
    create(overlay, disk.name)
    Journal.create(record(images=(str(overlay), str(disk))))
    (found,) = await recover_images([overlay])
    assert found.verdict.start == (str(overlay),)
    assert found.removed == ()
    assert await recover_images([overlay]) == []


async def test_a_journal_that_cannot_be_trusted_removes_nothing(disk, state):
    """Whoever can write beside an image could have any file removed."""
    victim = disk.with_name("victim")
    victim.write_text("precious")
    wanted = record(operation="snapshot", files=(str(victim),), images=(str(disk),))
    journal = Journal.create(wanted)
    made(journal, victim, "")
    forged = disk.with_name(f"{disk.name}.qmpblock-{RUN}.journal")
    shutil.move(journal.paths[0], forged)
    forged.chmod(0o666)
    assert await recover_images([disk]) == []
    assert victim.exists()


def names_a_data_file(image, place):
    hostile = with_data_file(place.eve / "hostile", place.secret)
    image.write_bytes(hostile.read_bytes())


def names_a_backing_image(image, place):
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", place.secret, image)


def is_another_file(image, place):
    """Root's own, by a link; one with the format that is expected."""
    create(place.root / "its.qcow2")
    image.rename(image.with_name("away"))
    image.symlink_to(place.root / "its.qcow2")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy")
@pytest.mark.parametrize("owner", [EVE, 0], ids=["hers", "given-back-to-root"])
@pytest.mark.parametrize("which", ["image", "overlay"])
@pytest.mark.parametrize("deceit", [names_a_data_file, names_a_backing_image, is_another_file])
async def test_what_is_brought_home_goes_nowhere_else(
    deceit, which, owner, staging, disk, tmp_path
):
    """Whoever ran QEMU has changed the images after it ended."""
    write(staging.overlay, 9)
    record_ = replace(
        staging.record,
        base_opened=as_text({"driver": "qcow2", "file": in_file(disk)}),
        written=((str(disk), disk.stat().st_ino),),
    )
    staging.journal.remove()
    staging.journal = Journal.create(record_, disk)
    staging.journal.add(pivoted=False)
    made(staging.journal, staging.overlay)
    place = Place(tmp_path)
    image = disk if which == "image" else staging.overlay
    deceit(image, place)
    for file in (disk, staging.overlay):
        if not file.is_symlink():
            os.chown(file, owner, owner)
    before = contents(place.root) | {"": place.secret.read_bytes()}
    place.opened()
    try:
        # Of the name of a backing image nothing comes: none is opened but what QEMU had open.
        if deceit is names_a_backing_image:
            await recover_images([disk])
            assert holds_alone(disk, 9)
        else:
            with contextlib.suppress(Error):
                await recover_images([disk])
        assert not place.opened()
    finally:
        place.close()
    assert contents(place.root) | {"": place.secret.read_bytes()} == before


def holds_alone(path, pattern):
    """Whether there is a megabyte of this byte, in the image itself."""
    image = {"driver": "qcow2", "file": in_file(path), "backing": None}
    done = tool("qemu-io", "-c", f"read -P {pattern} 0 1M", "json:" + json.dumps(image))
    assert "read 1048576" in done
    return "verification failed" not in done


KEYED = {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "k"}}
SECRET = ("--object", "secret,id=k,data=sesame")


async def make_encrypted(path):
    options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    path.unlink(missing_ok=True)
    make = ("qemu-img", "create", *SECRET, "-q", "-f", "qcow2", "-o", options, path, "4M")
    await retried(lambda: Tools.of(find_qemu()).run(*map(str, make)))


def by_key(path, do):
    opened = json.dumps(
        KEYED | {"file": {"driver": "file", "filename": str(path)}, "backing": None}
    )
    return subprocess.run(
        ["qemu-io", *SECRET, "-c", do, f"json:{opened}"], check=True, capture_output=True, text=True
    ).stdout


async def test_an_encrypted_overlay_is_brought_home_by_the_command_that_is_named(tmp_path, state):
    """We have no key; whoever has it runs the command as it is, and nothing of ours is left."""
    (tmp_path / "it's").mkdir()
    disk = tmp_path / "it's" / "disk.qcow2"
    await make_encrypted(disk)
    by_key(disk, "write -q -P 1 0 1M")
    staging = Staging(disk, header=False)
    await make_encrypted(staging.overlay)
    by_key(staging.overlay, "write -q -P 9 0 64k")
    made(staging.journal, staging.overlay)
    for image in (disk, staging.overlay):
        with pytest.raises(ToolError, match="key-secret") as caught:
            await recover_images([image])
        assert "holds the newest data" in caught.value.standing
    (tmp_path / "KEY_FILE").write_text("sesame")
    command = caught.value.remedy.partition("with it: ")[2]
    *commands, again = command.split(" && ")
    assert shlex.split(again) == ["qmpblock", "recover", str(disk)]
    subprocess.run(" && ".join(commands), shell=True, check=True, cwd=tmp_path)
    (found,) = await recover_images([disk])
    assert found.verdict.start == (str(disk),)
    assert await recover_images([disk]) == []
    assert [one.name for one in disk.parent.iterdir()] == ["disk.qcow2"]
    for pattern, where in ((9, "0 64k"), (1, "64k 960k")):
        assert "failed" not in by_key(disk, f"read -q -P {pattern} {where}")
