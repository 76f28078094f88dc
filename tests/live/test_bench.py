"""The measurements of copies and migrations run, and say what they say, at a small scale."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from nbdservers import CutOffError

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
WAYS = {
    "copy --at start",
    "copy --at end",
    "the command",
    "nbdcopy",
    "qemu-img convert -W",
    "blockdev-backup",
    "blockdev-mirror",
}
FELT = {"idle", *(name + slow for name in WAYS for slow in ("", ", slow target"))}


PHASES = {"checked", "mirroring", "ready", "memory", "held", "ended", "sent", "landed", "handed"}
MIGRATIONS = {
    "migrate": PHASES | {"compared"},
    "migrate --memory-only": PHASES - {"mirroring", "ready"} | {"compared"},
    "bare QMP": PHASES,
    "bare QMP, memory alone": PHASES - {"held", "ended", "sent"},
}


async def said(module, *words, within=()):
    process = await asyncio.create_subprocess_exec(
        *(*within, sys.executable, "-m", module, *words),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    return out.decode()


async def measured(module, vm_dir, *words):
    out = await said(module, *words, "--folder", str(vm_dir), "--json")
    assert not list(vm_dir.glob("bench-*"))
    return json.loads(out)


async def test_migrations_are_measured(vm_dir):
    words = ["--disks", "2", "--mib", "4", "--rounds", "1"]
    told = await measured("bench.migrate", vm_dir, *words)
    taken = told["disks"]["2"]
    assert taken.keys() == MIGRATIONS.keys()
    for name, [one] in taken.items():
        assert one["phases"].keys() == MIGRATIONS[name]
        assert one["stood"].keys() >= {"completed", "RESUME"}
        assert 0 < one["downtime"] < one["seconds"]
        assert sum(one["phases"].values()) == pytest.approx(one["seconds"], abs=0.5)


async def copies(vm_dir, *rows):
    words = [*rows, "--mib", "4", "--rounds", "1", "--seconds", "1"]
    return await measured("bench.copy", vm_dir, *words)


async def test_copies_are_measured(vm_dir):
    told = await copies(vm_dir)
    assert told["mib"] == 4
    for kind in ("in one piece", "scattered"):
        for fmt in ("raw", "qcow2"):
            taken = told["seconds"][kind][fmt]
            assert set(taken) == WAYS
            assert all(len(times) == 1 and min(times[0]) > 0 for times in taken.values())
    assert set(told["latency"]) <= FELT
    assert len(told["latency"]) == 7
    for one in told["latency"].values():
        assert one["errors"] == 0
        assert 0 < one["median"] <= one["p99"] <= one["longest"]


async def test_one_row_alone(vm_dir):
    told = await copies(vm_dir, "scattered/raw")
    assert {kind: set(formats) for kind, formats in told["seconds"].items()} == {
        "scattered": {"raw"}
    }
    assert "latency" not in told


async def test_copies_that_share_blocks(vm_dir):
    told = await copies(vm_dir, "reflink")
    if not told["seconds"]:
        pytest.skip("no XFS could be had")
    for fmt in ("raw", "qcow2"):
        assert set(told["seconds"]["reflink"][fmt]) == {"copy --reflink", "cp --reflink"}


async def test_a_fleet_is_measured():
    """Of two VMs, by each way; that all of them are told of the measurement itself sees."""
    lines = (await said("bench.fleet", "--vms", "2", "--rounds", "1")).splitlines()[3:]
    ways = [line.split(" s ")[0].rsplit(maxsplit=1)[0].strip() for line in lines]
    assert ways == ["vms", "metrics --no-map", "metrics", "maps of all", "map of each"]


async def test_what_ansible_costs_is_measured(host):
    """Of two hosts, which are one sshd of its own."""
    try:
        within = await host.having_sshd()
    except CutOffError as error:
        pytest.skip(str(error))
    words = ("--hosts", "2", "--forks", "2", "--rounds", "1")
    _, _, *lines = (await said("bench.playbooks", *words, within=within)).splitlines()
    ways = [line.rsplit(maxsplit=3) for line in lines]
    assert [way for way, *_ in ways] == ["true", "disk_info", "disk, check mode"]
    assert all(0 < float(each) < float(every) for _, every, each, _ in ways)
