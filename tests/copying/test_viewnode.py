"""The node by which a disk is read as it was. With QEMUs: live/test_points.py."""

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.copying.viewnode import UNIT, add_view, view_node
from qmpblock.errors import CommandError
from qmpblock.qemu.capabilities import Capabilities


def nodes_of(options):
    """Walk an inline tree: the options of each node, the root's first."""
    yield options
    for value in options.values():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict) and "driver" in child:
                yield from nodes_of(child)


def test_it_is_the_view_itself_where_that_reads_right():
    options = view_node("view", "filter", 4096, in_pieces=False)
    assert options == {"driver": "snapshot-access", "node-name": "view", "file": "filter"}


def test_whoever_goes_by_its_holes_is_told_of_all_layers():
    options = view_node("view", "filter", 4096, in_pieces=False, whole=True)
    root, view = nodes_of(options)
    assert (root["driver"], root["node-name"], root["vote-threshold"]) == ("quorum", "view", 1)
    assert root["read-pattern"] == "fifo"  # else each read is copied
    assert root["read-only"]
    assert view == {"driver": "snapshot-access", "file": "filter"}
    assert view_node("v", "f", 512, in_pieces=True, whole=True) == view_node(
        "v", "f", 512, in_pieces=True
    )


def test_else_it_lies_at_the_root_of_what_cuts_reads_into_units():
    options = view_node("view", "filter", 5 << 20, in_pieces=True)
    root, pieces, view, refusing, nothing = nodes_of(options)
    assert (root["node-name"], root["read-only"]) == ("view", True)
    assert (root["read-pattern"], root["vote-threshold"]) == ("fifo", 1)
    assert pieces["max-transfer"] == pieces["align"] == UNIT
    assert view == {"driver": "snapshot-access", "file": "filter"}
    assert [one["iotype"] for one in refusing["inject-error"]] == ["read"]
    assert nothing == {"driver": "null-co", "size": 5 << 20, "read-zeroes": False}
    assert all("node-name" not in one for one in (pieces, view, refusing, nothing))


async def test_a_qemu_without_these_drivers_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(Capabilities, "views_misread", True)
    answer = {"error": {"class": "GenericError", "desc": "Invalid parameter 'quorum'"}}
    async with fake_vm(tmp_path / "q", chain("d0"), **{"blockdev-add": answer}) as (vm, _):
        with pytest.raises(CommandError, match="quorum") as caught:
            await add_view(vm, "view", "filter", 4096)
    assert "quorum, blkdebug and null-co" in caught.value.remedy
