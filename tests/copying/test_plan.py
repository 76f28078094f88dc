"""What is copied where, and what is refused."""

from dataclasses import replace

import pytest
from drawing import chain

from qmpblock.address import TCPAddress
from qmpblock.copying.plan import plan_copy
from qmpblock.copying.target import NBDTarget
from qmpblock.errors import BusyError, RequestError, UnsupportedError
from qmpblock.graph.model import Bitmap


def device(drawn, **changes):
    """Return the disk of a drawing, its active layer changed."""
    found = drawn.device("d0").graph().device("vd0")
    layers = found.chain.layers
    active = replace(layers[0], node=replace(layers[0].node, **changes))
    return replace(found, chain=replace(found.chain, layers=(active, *layers[1:])))


def plan(its, fmt=None, layers="all", *, pivot=False):
    return plan_copy(its, "/i/copy", fmt, layers, pivot=pivot)


def test_the_format_is_the_disks_own_where_that_can_be():
    assert plan(device(chain("d0", "d1"))).format == "qcow2"
    assert plan(device(chain("d0"), driver="raw")).format == "raw"
    assert plan(device(chain("d0"), driver="qed")).format == "qcow2"
    assert plan(device(chain("d0", "d1"), driver="raw"), layers="top").format == "qcow2"
    assert plan(device(chain("d0", "d1")), "raw").format == "raw"


def test_what_of_the_chain_is_copied():
    its = device(chain("d0", "d1"))
    whole, top = plan(its), plan(its, layers="top")
    assert (whole.sync, whole.backing, len(whole.layers)) == ("full", None, 2)
    assert (top.sync, top.backing, len(top.layers)) == ("top", its.chain.layers[1], 1)
    alone = plan(device(chain("d0")), layers="top")
    assert (alone.sync, alone.backing) == ("full", None)


def test_of_one_layer_that_goes_into_a_new_file_nothing_else_is_gone_over():
    alone = device(chain("d0"))
    assert plan(alone).sync_of_disk == "top"
    assert plan(device(chain("d0", "d1"))).sync_of_disk == "full"
    assert plan(device(chain("d0", "d1")), layers="top").sync_of_disk == "top"
    # What is there may hold something where the disk holds nothing.
    server = NBDTarget(TCPAddress("h", 1), "t")
    assert plan_copy(alone, server, None, "all", pivot=False).sync_of_disk == "full"
    device_too = plan_copy(alone, "/dev/x", None, "all", pivot=False, block_device=True)
    assert device_too.sync_of_disk == "full"


def test_a_raw_copy_lies_on_nothing():
    with pytest.raises(RequestError, match="cannot lie on a backing image"):
        plan(device(chain("d0", "d1")), "raw", "top")


def test_no_other_format():
    with pytest.raises(UnsupportedError, match="vmdk"):
        plan(device(chain("d0")), "vmdk")


def test_no_plaintext_of_an_encrypted_disk_is_stored():
    named = 'json:{"encrypt.key-secret": "key0"}'
    its = device(chain("d0"), encrypted=True, filename=named)
    assert plan(its).secret == "key0"
    with pytest.raises(UnsupportedError, match="plaintext"):
        plan(its, "raw")


def test_to_a_server_go_the_bytes_of_the_disk_alone():
    server, its = NBDTarget(TCPAddress("h", 1), "t"), device(chain("d0", "d1"))
    found = plan_copy(its, server, None, "all", pivot=False)
    assert (found.format, found.file, found.server) == ("raw", "nbd://h:1/t", server)
    assert found == plan_copy(its, server, "raw", "all", pivot=False)
    for fmt, layers, pivot, words in (
        ("qcow2", "top", False, "is to hold all of a disk"),
        (None, "all", True, "cannot go over"),
        (None, "top", False, "cannot lie on a backing image"),
    ):
        with pytest.raises(RequestError, match=words):
            plan_copy(its, server, fmt, layers, pivot=pivot)


def test_nothing_is_done_beside_a_job():
    drawn = chain("d0").job("theirs", "backup", "running", "d0")
    with pytest.raises(BusyError, match="theirs"):
        plan(device(drawn))


def test_a_disk_for_reading_only_is_copied_but_not_gone_over_from():
    its = replace(device(chain("d0")), read_only=True)
    assert plan(its).format == "qcow2"
    with pytest.raises(UnsupportedError, match="for reading only"):
        plan(its, pivot=True)


def test_what_a_pivot_leaves_behind_is_said():
    its = device(chain("d0"), bitmaps=(Bitmap("nightly", 65536, True, False),))
    assert plan(its).warnings == ()
    [warning] = plan(its, pivot=True).warnings
    assert "nightly" in warning
    its = device(chain("d0"), snapshots=("before",))
    assert plan(its).warnings == ()
    [warning] = plan(its, pivot=True).warnings
    assert "snapshots (savevm) before of vd0 stay with" in warning
