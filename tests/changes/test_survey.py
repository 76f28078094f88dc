"""Which journals there are: none that is ours by its name is passed over in silence."""

import errno
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import oldrecords
import pytest
from drawing import RUN, VM, record
from journaling import Full, as_format_1, beside, elsewhere, of_pivot

from qmpblock.changes.journal import FORMAT, Journal, state_directory
from qmpblock.changes.leftovers import record_of
from qmpblock.changes.operations import ActiveCommit, read_record
from qmpblock.changes.record import VMIdentity
from qmpblock.changes.survey import MOST, Survey, find, is_of, journals, survey, unproven
from qmpblock.errors import RecordError
from qmpblock.host.statedirectory import OpenDirectory
from qmpblock.qemu.lock import Holder
from qmpblock.versioned import stamped


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Keep journals out of the real state directory."""
    where = tmp_path / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"image")
    return path


def test_two_disks_of_a_vm_have_two_journals(state):
    one = Journal.create(record())
    two = Journal.create(record(run="cafebabe", devices=("/machine/peripheral/vd1",)))
    assert one.paths != two.paths
    assert {found.record.run for found in journals()} == {RUN, "cafebabe"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_beside_the_image(state, image, monkeypatch, number):
    """The way out of a full disk is a commit; the state directory has its journal then."""
    with Full(monkeypatch, image.parent, number=number):
        journal = Journal.create(of_pivot(image), image)
        assert [path.parent for path in journal.paths] == [state]
        assert not beside(image).exists()
        assert elsewhere(image).read_bytes() == b""
        journal.mark(pivoted=True)
    (found,) = journals((str(image),))
    assert found.record == journal.record
    assert found.pivoted
    assert found.complete
    found.remove()
    assert list(state.glob("*.journal")) == []
    assert list(image.parent.glob("*qmpblock*")) == []


def test_not_even_an_inode_beside_the_image(image, monkeypatch):
    with Full(monkeypatch, image.parent, inodes=True):
        journal = Journal.create(of_pivot(image), image)
        assert not elsewhere(image).exists()
        journal.mark(pivoted=True)
    assert next(journals((str(image),))).complete
    journal.remove()


def test_on_another_host_the_image_says_that_its_journal_is_elsewhere(image, monkeypatch, tmp_path):
    with Full(monkeypatch, image.parent):
        Journal.create(of_pivot(image), image)
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "another host's"))
    found = survey((str(image),))
    assert found.journals == []
    (error,) = found.unreadable
    assert error.files == (str(image),)
    assert str(elsewhere(image)) in str(error)
    assert f"qmpblock recover {image}" in error.remedy


@pytest.mark.parametrize("inodes", [True, False])
def test_no_room_in_the_state_directory(state, image, monkeypatch, inodes):
    Journal.create(of_pivot(image), image).remove()  # there is a key
    with Full(monkeypatch, state, inodes=inodes):
        journal = Journal.create(of_pivot(image), image)
        assert journal.paths == (beside(image),)
        journal.mark(pivoted=True)
    (found,) = journals((str(image),))
    assert found.pivoted
    assert found.complete
    journal.remove()


@pytest.mark.parametrize("line", ["[]", "5", "not json", "null", "", '"pivoted"'])
def test_a_line_that_is_no_entry_spoils_the_journal(image, line):
    journal = Journal.create(of_pivot(image), image)
    path = beside(image)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(RecordError, match="line 2 is damaged") as caught:
        Journal.load(path)
    assert str(path) in str(caught.value)
    assert caught.value.run == RUN
    found = survey()
    assert [one.paths for one in found.journals] == [journal.paths[:1]]
    assert [error.path for error in found.unreadable] == [path]


@pytest.mark.parametrize(
    "name", ["operation", "pivot", *(one.name for one in fields(ActiveCommit))]
)
def test_a_field_fewer_is_read_or_said(image, name):
    """Never skipped: the next start of that VM would be from the wrong image."""
    Journal.create(of_pivot(image), image)
    for path in (beside(image), *state_directory().glob("*.journal")):
        said = json.loads(path.read_text())
        said.pop(name, None)
        path.write_text(json.dumps(said) + "\n")
    found = survey((str(image),))
    assert bool(found.journals) != bool(found.unreadable)
    for error in found.unreadable:
        assert name in str(error) or "contradicted" in str(error)


def test_a_field_more_is_kept(image):
    path = Journal.create(of_pivot(image), image).paths[0]
    beside(image).unlink()
    path.write_text(path.read_text().replace('{"format"', '{"later": [1], "format"'))
    (found,) = journals()
    assert found.record.more == {"later": [1]}
    assert found.record.as_json()["later"] == [1]


@pytest.mark.parametrize("about", ["this image", "another", "none that can be told"])
def test_a_newer_format_is_said_with_its_version(image, about):
    path = Journal.create(record(images=("/i/x",))).paths[0]
    newer = {"format": FORMAT + 1, "version": "9.9", "images": [about], "files": []}
    if about.startswith("none"):
        del newer["images"]
    path.write_text(json.dumps(newer) + "\n")
    (error,) = survey((str(image),)).unreadable
    assert "written by qmpblock 9.9" in str(error)
    assert str(path) in str(error)
    assert "qmpblock recover IMAGE" in error.remedy
    assert error.files == (None if about.startswith("none") else (about,))


def test_what_lies_beside_an_image_is_about_it(image):
    beside(image).write_text("damaged\n")
    (error,) = survey((str(image),)).unreadable
    assert error.files == (str(image),)


def test_a_journal_from_before_there_was_a_format_is_read(state):
    state.mkdir()
    path = state / f"x-1-1-deadbeef-{oldrecords.RUN}.journal"
    path.write_text(oldrecords.JOURNAL)
    (found,) = journals()
    assert found.pivoted
    assert found.record.base_file == "/i/base.qcow2"
    assert found.record.leaving == (("qmpblock-0badcafe-0", "/i/top.qcow2"),)
    assert found.record == record_of(Holder.from_text(oldrecords.LOCK))  # find_journal finds it
    text = path.read_text()
    found.mark(pivoted=False)
    assert path.read_text() == text + '{"pivoted": false}\n'


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that others own")
def test_what_others_could_have_written_is_said(image):
    for run, mode, owner in ((RUN, 0o666, 0), ("cafebabe", 0o600, 1234)):
        path = beside(image, run)
        path.write_text("{}\n")
        path.chmod(mode)
        os.chown(path, owner, -1)
    beside(image, "0badcafe").symlink_to(image)
    found = survey((str(image),))
    assert found.unreadable == []
    assert {(path, why) for path, why in found.distrusted} == {
        (beside(image), "others may write to it"),
        (beside(image, "cafebabe"), "it belongs to the user 1234"),
        (beside(image, "0badcafe"), "it is no plain file"),
    }


def test_no_more_than_some_are_read(image):
    """Whoever may write there had us read millions, one after another."""
    Journal.create(of_pivot(image), image)
    for number in range(MOST - 1):
        beside(image, f"{number:08x}").touch()
    assert [one.record.run for one in survey((str(image),)).journals] == [RUN]
    beside(image, f"{MOST:08x}").touch()
    found = survey((str(image),))
    [error] = found.unreadable
    assert f"lie {MOST + 1} files that are journals by their names" in error.message
    assert error.files == (str(image),)
    assert [one.record.run for one in found.journals] == [RUN]  # the state directory tells of it
    other = image.with_name("other.qcow2")
    assert survey((str(other),)).unreadable == []


def test_one_of_ours_that_may_not_be_read_is_said(image, monkeypatch):
    """Another user runs recover: silence would say that the image is safe."""
    Journal.create(of_pivot(image), image)

    real = os.open

    def refuse(path, *arguments, **options):
        if "/proc/self/fd/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    with monkeypatch.context() as patching:
        patching.setattr(os, "open", refuse)
        found = survey((str(image),))
    assert found.journals == []
    assert [error.path.name for error in found.unreadable] != []
    assert all("Permission denied" in str(error) for error in found.unreadable)


def test_a_directory_that_may_not_be_listed_is_said(image, monkeypatch, state):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    state.mkdir(mode=0o700)
    monkeypatch.setattr(os, "listdir", refuse)
    assert len(survey((str(image),)).unreadable) == 2


def test_both_places_are_one_journal(state, image):
    made = Journal.create(of_pivot(image), image)
    made.add(made="x")
    made.mark(pivoted=True)
    for named in ((), (str(image),), (str(image), str(image))):
        (found,) = journals(named)
        assert found.record == made.record
        assert found.paths == made.paths
        assert found.entries == [{"made": "x"}, {"pivoted": True}]
        assert found.complete
    # What goes on from here is written where the next one looks.
    found.mark(pivoted=False)
    (again,) = journals()
    assert not again.pivoted


def test_found_beside_the_image_alone(state, image):
    """On another host, or after the state directory was lost."""
    made = Journal.create(of_pivot(image), image)
    made.mark(pivoted=True)
    made.paths[0].unlink()
    assert list(journals()) == []
    (found,) = journals((str(image),))
    assert found.pivoted
    assert found.complete
    found.remove()
    assert list(image.parent.glob("*.journal")) == []


def test_without_the_one_beside_the_image_one_of_format_1_is_not_complete(image):
    made = Journal.create(of_pivot(image), image)
    made.mark(pivoted=True)
    as_format_1(made)
    beside(image).unlink()
    (found,) = journals((str(image),))
    assert not found.pivoted  # that word stood there alone
    assert not found.complete
    assert Journal.create(record(run="cafebabe")).complete  # what pivots nothing has no home


def test_a_forged_one_beside_the_image_does_not_speak_for_ours(image):
    """Same run, another record: it would have us start from, or remove, another file."""
    made = Journal.create(of_pivot(image))
    forged = Journal(of_pivot(image, files=("/etc/passwd",)), (beside(image),), [])
    beside(image).write_text(json.dumps(forged.record.as_json()) + '\n{"pivoted": true}\n')
    beside(image).chmod(0o600)
    (found,) = journals((str(image),))
    assert found.record == made.record
    assert found.paths == made.paths
    assert not found.pivoted


def test_other_images_and_other_files_are_left_out(image):
    other = image.with_name("disk.qcow2-old")
    other.write_bytes(b"")
    Journal.create(of_pivot(other), other).paths[0].unlink()
    image.with_name(f"{image.name}.qmpblock-cafebabe").write_text("an overlay")
    image.with_name(f"{image.name}.qmpblock-cafebabe-z").write_text("zeros")
    image.with_name("x.journal").write_text("somebody's")
    assert survey((str(image),)) == Survey()
    assert len(list(journals((str(other),)))) == 1
    assert list(journals((str(image.parent / "nosuch" / "image"),))) == []


def test_a_process_is_identified():
    data = VMIdentity("n", "u", 1, 2, "b", "m")
    assert read_record(replace(record(), vm=data).as_json()).vm == data
    error = RecordError("", path=Path("/s/u-1-2-cafebabe-deadbeef.journal"))
    assert is_of(error, data)
    assert not is_of(error, replace(data, start=3))
    assert VM.pid == 0


# what no key proves


def claim(image, **changes):
    """Put a journal beside an image that nobody of ours wrote, and say what it claims."""
    wanted = of_pivot(image, images=(str(image), "/i/base"), **changes)
    path = beside(image)
    path.write_text(json.dumps(stamped(wanted.as_json())) + '\n{"pivoted": true}\n')
    path.chmod(0o600)
    return wanted


def test_what_no_key_proves_does_not_count(image):
    claim(image)
    found = survey((str(image),))
    assert found.journals == []
    assert [one.paths for one in found.unproven] == [(beside(image),)]
    assert Journal.load(beside(image)) is None
    error = unproven(found.unproven[0])
    for words in (RUN, str(image), "/i/base", "is not proven to be ours"):
        assert words in str(error)
    for words in ("on the host where it was begun", ".key", "--believe-journal"):
        assert words in error.remedy


@pytest.mark.parametrize("how", ["a line more", "a line of before", "no key", "another key"])
def test_another_hosts_journal_is_proven_by_its_key_alone(image, monkeypatch, tmp_path, how):
    made = Journal.create(of_pivot(image), image)
    made.add(made="x")
    made.mark(pivoted=True)
    here = tmp_path / "another host's"
    here.mkdir(mode=0o700)
    key = here / "first.key"
    key.write_bytes((state_directory() / "key").read_bytes())
    key.chmod(0o600)
    monkeypatch.setenv("QMPBLOCK_STATE", str(here))
    (found,) = journals((str(image),))
    assert found.pivoted
    found.mark(pivoted=False)  # whoever comes next believes this, too
    (found,) = journals((str(image),))
    assert not found.pivoted
    path = beside(image)
    if how == "a line more":
        path.write_text(path.read_text() + '{"pivoted": true}\n')
    elif how == "a line of before":
        path.write_text(path.read_text() + path.read_text().splitlines()[2] + "\n")
    elif how == "no key":
        key.unlink()
    else:
        key.write_bytes(bytes(32))
    found = survey((str(image),))
    assert found.journals == []
    assert len(found.unproven) == 1


def test_beside_another_image_it_is_not_of_that_change(image):
    """A proven one, moved to where somebody would like it to be."""
    made = Journal.create(of_pivot(image), image)
    made.paths[0].unlink()
    other = image.with_name("other.qcow2")
    beside(image).rename(beside(other))
    found = survey((str(other),))
    assert found.journals == []
    assert found.distrusted == [(beside(other), "it is of another change, or image")]


@pytest.mark.parametrize("more", [0, 1, 2])
def test_the_state_directory_decides(image, more):
    """Killed between two fsyncs: what one of them says was not acted upon."""
    made = Journal.create(of_pivot(image), image)
    made.add(made="x")
    path = beside(image) if more == 0 else made.paths[0]
    before = path.read_bytes()
    made.mark(pivoted=True)
    if more == 1 or more == 0:
        path.write_bytes(before)
    (found,) = journals((str(image),))
    assert found.pivoted is (more != 1)
    assert len(found.paths) == 2
    found.mark(pivoted=False)
    assert len({one.read_bytes() for one in found.paths}) == 1
    (found,) = journals((str(image),))
    assert not found.pivoted


def test_one_that_was_torn_beside_the_image_goes_with_its_journal(image):
    made = Journal.create(of_pivot(image), image)
    beside(image).write_bytes(beside(image).read_bytes()[:30])
    (found,) = journals((str(image),))
    assert found.paths == made.paths
    found.remove()
    assert not beside(image).exists()


def test_a_journal_of_format_1_is_gone_on_with(image):
    """Another version began it on this host; its marks lie beside the image."""
    made = Journal.create(of_pivot(image), image)
    made.mark(pivoted=True)
    as_format_1(made)
    (found,) = journals((str(image),))
    assert found.pivoted
    found.mark(pivoted=False)
    (found,) = journals((str(image),))
    assert not found.pivoted
    found.remove()
    assert list(image.parent.glob("*.journal")) == []


# whose it is


HERE = replace(VM, pid=4, start=5, boot="b")


def test_a_lock_only_says_which_to_look_for(image):
    wanted = of_pivot(image, vm=HERE)
    made = Journal.create(wanted, image)
    assert find(wanted, HERE).paths == made.paths
    assert find(replace(wanted, run="cafebabe", job="qmpblock-cafebabe-pivot"), HERE) is None
    assert find(replace(wanted, base="another"), HERE) is None


def test_where_a_lock_says_is_not_even_looked_at(image, monkeypatch, tmp_path):
    """What it looks for is in the state directory; a directory may hang, or be a trap."""
    wanted = of_pivot(image, vm=HERE)
    Journal.create(wanted)
    opened = []
    monkeypatch.setattr(OpenDirectory, "at", lambda path: opened.append(path))
    assert find(replace(wanted, top_file=str(tmp_path / "trap" / "x")), HERE) is None
    assert opened == [image.parent]


@pytest.mark.usefixtures("state")
def test_a_copy_alone_is_found_by_a_lock(image):
    """The state directory was full; the key had been made before."""
    wanted = of_pivot(image, vm=HERE)
    made = Journal.create(wanted, image)
    made.paths[0].unlink()
    assert find(wanted, HERE).paths == made.paths[1:]
    assert find(wanted, replace(HERE, pid=3)) is None


@pytest.mark.parametrize("other", [{"pid": 3}, {"start": 4}, {"boot": "c"}, {"uuid": "1" * 36}])
def test_another_vms_journal_is_never_found(image, other):
    """Its lock has been copied into this VM, word by word."""
    wanted = of_pivot(image, vm=HERE)
    Journal.create(wanted, image)
    assert find(wanted, replace(HERE, **other)) is None


@pytest.mark.parametrize(
    ("begun", "now"),
    [
        (VM, HERE),
        (HERE, VM),
        (VM, replace(VM, monitor="tcp:other:1")),
    ],
)
def test_what_cannot_be_proven_to_be_this_vms_is_said(image, begun, now):
    wanted = of_pivot(image, vm=begun)
    Journal.create(wanted, image)
    with pytest.raises(RecordError, match="cannot be proven") as caught:
        find(wanted, now)
    assert caught.value.remedy == f"run: qmpblock recover {begun.monitor}"


def test_a_lock_does_not_lead_to_what_no_key_proves(image):
    wanted = claim(image)
    with pytest.raises(RecordError, match="not proven to be ours"):
        find(wanted, VM)
    for home in ("/nosuch/x", "relative", "/i/\0", "x" * 5000):
        assert find(replace(wanted, run="cafebabe", top_file=home), VM) is None


def test_where_others_can_write_nothing_can_be_told(image, state):
    wanted = of_pivot(image)
    Journal.create(wanted, image)
    state.chmod(0o777)
    with pytest.raises(RecordError, match="writable for others"):
        find(wanted, VM)
