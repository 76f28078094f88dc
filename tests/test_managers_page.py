"""The tables of docs/managers.md, verb by manager: made of tests, and of the code that refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import reaching
from reaching import DIRECTLY, PVE, REFUSED, ROWS

from qmpblock.cli.vms_command import _show
from qmpblock.graph.model import Chain, Device, Layer, Node
from qmpblock.inventory.listing import RunningVM, _managed
from qmpblock.managers import Manager, Verb, Work, refused

PAGE = Path(__file__).parents[1] / "docs" / "managers.md"
#: Those whose ways are shown; LXD's and Ganeti's follow from a sentence.
SHOWN = ("libvirt", "Proxmox VE", "Incus")
LIBVIRT_WAY = reaching.LIBVIRT
LIBVIRT, PROXMOX, INCUS = (Manager(name, "", "") for name in SHOWN)


def _way(manager, verb):
    return manager.way(Work(verb, ""))


def table():
    """Return the table: what libvirt is asked for, and what each would do by itself."""
    head = "| | by `libvirt:DOMAIN` | the way of libvirt | of Proxmox VE | of Incus |\n"
    rows = []
    for verb in get_args(Verb):
        lent = "refused" if verb in refused(LIBVIRT, lent=True) else "**libvirt does it**"
        ways = (_way(manager, verb) for manager in (LIBVIRT, PROXMOX, INCUS))
        rows.append(f"| {Work(verb, '').called} | {lent} | {' | '.join(ways)} |\n")
    return head + "|---|---|---|---|---|\n" + "".join(rows)


def _listed(name, pid, user, manager=None, size=0, fmt="", file="", layers=0, **more):
    """Return a VM as `qmpblock vms` finds it."""
    devices = None
    if size:
        node = Node("d", fmt, file, size, read_only=False)
        each = tuple(Layer(depth, node, None) for depth in range(layers))
        chain = Chain((), each, (0,) * layers, (size,) * layers)
        disk = "virtio-disk0" if manager else "vd0"
        devices = (Device(disk, None, "/machine/peripheral/d", False, False, chain),)
    vm = RunningVM(name, pid, user, devices=devices, status="running" if size else None, **more)
    return _managed(vm, manager)


def test_the_list_of_vms_that_it_shows_is_what_the_command_prints(capsys):
    _show(
        [
            _listed(
                *("web", 4711, "libvirt-qemu", LIBVIRT, 20 << 30, "qcow2", "/srv/web.qcow2", 3),
                address="libvirt:web",
                called={"virtio-disk0": "vda"},
            ),
            _listed(
                *("build", 4722, "ci", None, 8 << 30, "raw", "/srv/ci/build.raw", 1),
                address="unix:/run/ci/build.qmp",
            ),
            _listed(
                *("old", 4733, "ci"),
                trouble="it has no QMP monitor that listens",
                remedy="start it with -qmp unix:/run/qmpblock/VM.qmp,server=on,wait=off",
            ),
        ]
    )
    printed = capsys.readouterr().out
    assert f"\n```\n{printed}```\n" in PAGE.read_text(encoding="utf-8"), printed


def test_the_page_has_what_the_code_has():
    """Prints what belongs into the page where it does not stand there."""
    assert table() in PAGE.read_text(encoding="utf-8"), "\n" + table()


def test_the_page_has_what_the_tests_show():
    """Prints what belongs into the page where it does not stand there."""
    assert reaching.table() in PAGE.read_text(encoding="utf-8"), "\n" + reaching.table()


def test_each_cell_is_of_a_test_that_is_collected():
    tests = {cell.test for row in ROWS for cell in row.cells.values()}
    files = sorted({test.partition("::")[0] for test in tests})
    folder = Path(__file__).parent
    listing = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    listed = subprocess.run(
        [*listing, *files],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.parent), "QMPBLOCK_WHOLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = set()
    for line in listed.stdout.splitlines():
        name = line.removeprefix("tests/")
        found |= {name, name.partition("[")[0]}
    assert tests - found == set(), listed.stdout[-500:] + listed.stderr[-500:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_tables_agree_with_the_code_that_refuses(row):
    """What changes no chain refuses the code nowhere; else as a cell says."""
    for way, manager in ((LIBVIRT_WAY, LIBVIRT), (PVE, PROXMOX), (reaching.INCUS, INCUS)):
        cell = row.cells[way]
        if row.verb:
            refuses = row.verb in refused(manager, lent=way == LIBVIRT_WAY)
            assert (cell.done == REFUSED) is refuses
        assert bool(cell.why) is (cell.done == REFUSED)
    assert row.cells[reaching.PLAIN].done == DIRECTLY


def test_no_verb_is_left_out():
    """Those that are parts of others, in the code's words, have no row of their own."""
    parts = {"commit", "independent", "freeze"}
    assert {row.verb for row in ROWS} - {""} == set(get_args(Verb)) - parts


@pytest.mark.parametrize("verb", get_args(Verb))
def test_lxds_and_ganetis_ways_are_as_the_page_says(verb):
    assert _way(Manager("LXD", "", ""), verb) == _way(INCUS, verb).replace("incus", "lxc", 1)
    gnt = "gnt-instance migrate" if verb == "migrate" else "gnt-instance shutdown"
    assert _way(Manager("Ganeti", "", ""), verb).startswith(gnt)


@pytest.mark.parametrize("name", [*SHOWN, "LXD", "Ganeti"])
def test_all_of_it_is_refused_where_the_manager_is_not_asked(name):
    assert refused(Manager(name, "", "")) == get_args(Verb)
    assert (refused(Manager(name, "", ""), lent=True) == get_args(Verb)) is (name != "libvirt")
