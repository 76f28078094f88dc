"""What a guest's disk is set to, and what of that another active layer would have."""

import json

import pytest
from drawing import chain, record

from qmpblock.chains.settings import (
    discard_to_restore,
    lost_by_commit,
    lost_by_snapshot,
    wanted_discard,
)
from qmpblock.changes.step import Choice
from qmpblock.changes.unfinished import steps
from qmpblock.graph.options import discard_of


def blockdev(**options):
    return ["-blockdev", json.dumps({key.replace("_", "-"): options[key] for key in options})]


INSIDE = {"driver": "qcow2", "node-name": "d1", "file": "d1-f"}
DRIVE = "file=/i/d0,format=qcow2,if=none,id=dr"


def layers(drawing):
    device = drawing.graph().device("vd0")
    return device, device.chain.layers


@pytest.mark.parametrize(
    ("command", "discards"),
    [
        ([], (None, None)),
        (blockdev(driver="qcow2", node_name="d0", discard="unmap"), ("unmap", None)),
        (blockdev(driver="qcow2", node_name="d0"), ("ignore", None)),
        (blockdev(driver="qcow2", node_name="d0", backing=INSIDE), ("ignore", "unmap")),
        (
            blockdev(driver="qcow2", node_name="d0", backing={**INSIDE, "discard": "ignore"}),
            ("ignore", "ignore"),
        ),
        (["-drive", DRIVE], ("ignore", None)),
        (["-drive", f"{DRIVE},discard=on"], ("unmap", None)),
        (["-drive", f"{DRIVE},discard=nonsense"], (None, None)),
    ],
)
def test_which_discard_a_node_has(command, discards):
    _, found = layers(chain("d0", "d1"))
    assert tuple(discard_of(command, layer.node) for layer in found) == discards


def test_a_node_that_qemu_opened_by_itself_has_its_default():
    _, found = layers(chain("d0", "#block123"))
    assert discard_of([], found[1].node) == "unmap"


def test_the_owner_gave_it_to_the_uppermost_layer_that_the_command_line_names():
    """Overlays of ours came later."""
    command = blockdev(driver="qcow2", node_name="d0", discard="ignore")
    device, found = layers(chain("qmpblock-0", "d0", "#block1"))
    assert wanted_discard(command, device.chain) == "ignore"
    assert discard_to_restore(command, device.chain, found[1]) == ""
    assert discard_to_restore(command, device.chain, found[2]) == "ignore"
    assert wanted_discard([], device.chain) is None
    assert discard_to_restore([], device.chain, found[2]) == ""


def test_what_a_snapshot_loses():
    drawing = chain("d0", "d1")
    device, _ = layers(drawing)
    assert list(lost_by_snapshot([], device)) == []
    assert list(lost_by_snapshot(["-drive", DRIVE], device)) == []
    [said] = lost_by_snapshot(["-drive", f"{DRIVE},copy-on-read=on"], device)
    assert "copy-on-read=on of vd0" in said
    drawing.nodes["d0-f"]["write_threshold"] = 4096
    device, _ = layers(drawing)
    [said] = lost_by_snapshot([], device)
    assert "write threshold at 4096 of d0-f" in said
    assert list(lost_by_snapshot([], device, watched=True)) == []


def test_what_a_commit_loses():
    drawing = chain("d0", "d1")
    drawing.nodes["d0-f"]["cache"] = {"direct": True, "writeback": True, "no-flush": False}
    command = ["-drive", f"{DRIVE},aio=native,copy-on-read=on"]
    device, (_, base) = layers(drawing)
    cache, aio, reads = lost_by_commit(command, device, base)
    assert "cache.direct of vd0 is on now, and will be off" in cache
    assert "aio of vd0 is native now, and will be threads" in aio
    assert "copy-on-read=on of vd0 does not go on in /i/d1" in reads
    same = [*command, *blockdev(driver="file", node_name="d1-f", aio="native")]
    assert [one for one in lost_by_commit(same, device, base) if "aio" in one] == []


def pivoted(**changes):
    names = {"operation": "commit", "pivot": True, "top": "d0", "base": "d1"}
    return record(**names, **changes)


@pytest.mark.parametrize(
    ("discard", "verbs"),
    [
        ("unmap", ["restore-discard", "restore-zeroes"]),
        ("ignore", ["restore-zeroes", "restore-discard"]),
        ("", ["restore-zeroes"]),
    ],
)
def test_the_base_gets_them_back_in_an_order_that_qemu_takes(discard, verbs):
    """Only when the guest is there."""
    done = pivoted(detect_zeroes="unmap", discard=discard)
    found = steps(done, chain("d1").graph(), Choice.CONTINUE)
    assert [step.verb for step in found] == verbs
    assert steps(done, chain("d0", "d1").graph(), Choice.UNDO) == ()
