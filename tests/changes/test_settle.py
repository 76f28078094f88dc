"""What is left of a change is performed, against a fake QEMU. Real ones: live/test_killing.py."""

from dataclasses import replace
from pathlib import Path

import pytest
from drawing import RUN, Drawing, chain, record
from fake_objects import dead, fake_vm

from qmpblock.changes import settle as settling
from qmpblock.changes.journal import Journal
from qmpblock.changes.settle import device_of, settle
from qmpblock.changes.step import Choice
from qmpblock.names import NBD_LOCK, export_name


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    where = tmp_path / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


def test_the_disk_of_a_change_also_when_it_is_unplugged():
    graph = chain("d0").device("d0", "vd1").graph()
    assert device_of(record(), graph).chain is not None
    gone = device_of(record(devices=("/machine/peripheral/vd9",), names=("vd9",)), graph)
    assert gone.chain is None
    assert gone.name == "vd9"


@pytest.fixture
def overlay(tmp_path):
    """Return the file of an overlay that was never used, with its record and journal."""
    path = tmp_path / "new"
    path.write_bytes(b"overlay")
    wanted = record(operation="snapshot", files=(str(path),))
    journal = Journal.create(wanted)
    status = path.stat()
    journal.add(made=str(path), dev=status.st_dev, ino=status.st_ino)
    return path, wanted, journal


async def test_an_unused_file_of_ours_is_removed(tmp_path, overlay):
    path, wanted, journal = overlay
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        graph = await settle(vm, wanted, journal, Choice.UNDO)
        assert wanted.took_effect(graph) is False
        assert not path.exists()
        graph = await settle(vm, wanted, journal, Choice.UNDO)
        assert wanted.took_effect(graph) is False  # idempotent


async def test_what_belongs_to_a_wire_is_cleared_once(tmp_path):
    """It would be without end: nothing in the graph tells whether it is there."""
    wire = f"qmpblock-{RUN}-0-wire"
    wanted = record(operation="copy", nodes=(wire,), wires=((wire, f"/tmp/{wire}/nbd"),))
    told = []
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        await settle(vm, wanted, None, Choice.UNDO, told.append)
    assert [step.verb for step in told] == ["clear-wire"]


async def test_one_that_another_copy_can_go_on_from_gets_its_name(tmp_path, overlay):
    """Also where whoever recovers was killed when it had it already, or half."""
    path, wanted, journal = overlay
    partial = tmp_path / "new.partial"
    journal.add(file=str(path), worth=True)
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        for _ in range(2):
            await settle(vm, wanted, journal, Choice.UNDO)
            assert partial.read_bytes() == b"overlay"
            assert not path.exists()
        path.hardlink_to(partial)  # linked, and not unlinked yet
        await settle(vm, wanted, journal, Choice.UNDO)
        assert partial.read_bytes() == b"overlay"
        assert not path.exists()
        path.write_text("precious")
        await settle(vm, wanted, journal, Choice.UNDO)
        assert path.read_text() == "precious"


async def test_without_its_journal_no_file_is_removed(tmp_path, overlay):
    """The lock names files, too; but only the journal says that we made them."""
    path, wanted, _ = overlay
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        await settle(vm, wanted, None, Choice.UNDO)
    assert path.exists()


async def test_another_file_of_that_name_is_not_removed(tmp_path, overlay):
    path, wanted, journal = overlay
    path.rename(tmp_path / "moved")
    path.write_text("precious")
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        await settle(vm, wanted, journal, Choice.UNDO)
    assert path.read_text() == "precious"
    assert (tmp_path / "moved").exists()


async def test_a_file_that_qemu_has_open_under_another_name_is_not_removed(tmp_path, overlay):
    """This process is the fake's QEMU."""
    path, wanted, journal = overlay
    link = tmp_path / "link"
    link.hardlink_to(path)
    async with fake_vm(tmp_path / "q", Drawing().image("d0").device("d0")) as (vm, _):
        with link.open("rb"):
            await settle(vm, wanted, journal, Choice.UNDO)
        assert path.exists()
        await settle(vm, wanted, journal, Choice.UNDO)
    assert not path.exists()
    assert Path(link).exists()


async def test_what_lies_upon_each_other_goes_between_two_looks(tmp_path, overlay):
    """And what is no node of QEMU's needs none after it."""
    path, wanted, journal = overlay
    names = (f"qmpblock-{RUN}-0", f"qmpblock-{RUN}-0-f")
    wanted = replace(wanted, nodes=names)
    drawing = chain("d0").image(names[0], file=str(path))
    async with fake_vm(tmp_path / "q", drawing) as (vm, objects):
        objects.fake.seen.clear()
        await settle(vm, wanted, journal, Choice.UNDO)
        asked = [one["execute"] for one in objects.fake.seen]
    assert asked.count("query-named-block-nodes") == 2
    assert [name for name in asked if not name.startswith(("query-", "x-"))] == ["blockdev-del"] * 2
    assert set(drawing.nodes) == {"d0", "d0-f"}
    assert not path.exists()


OURS = f"qmpblock-{RUN}-to-0"
MAPPED = "0badcafe"


def exported():
    """Draw a node of a change that somebody of ours exports."""
    return chain("d0").image(OURS, file="/i/t").device("d0").export(export_name(MAPPED, 0), OURS)


async def test_exports_of_a_controller_that_died_are_ended(tmp_path):
    """Whatever it did: nobody else ends them, and they keep nodes from going."""
    its = record(operation="snapshot", nodes=(OURS,), files=())
    use = {"exports": [export_name(MAPPED, 0)], "path": "", "ports": []}
    async with fake_vm(tmp_path / "q", exported()) as (vm, objects):
        objects.hold(NBD_LOCK, dead(MAPPED, **use, monitor=str(tmp_path / "q"), custody=False))
        await settle(vm, its, None, Choice.UNDO)
        assert objects.drawing.exports == {}
        assert OURS not in objects.drawing.nodes
        assert NBD_LOCK not in objects.objects


async def test_one_that_lives_is_not_waited_for_without_an_end(tmp_path, monkeypatch):
    """What it exports stays, and that is no failure, however often it was looked at."""
    monkeypatch.setattr(settling, "_LOOK", 0.001)
    monkeypatch.setattr(settling, "_ROUNDS", 3)
    its = record(operation="snapshot", nodes=(OURS,), files=())
    async with fake_vm(tmp_path / "q", exported()) as (vm, objects):
        vm.stall = 0.1
        await settle(vm, its, None, Choice.UNDO)
        assert OURS in objects.drawing.nodes
