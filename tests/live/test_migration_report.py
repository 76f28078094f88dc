"""What a migration says of itself: how long what took, for how long the guest stood."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
from chains import cli
from jsonschema import Draft202012Validator
from migrating import arrived, both, machine

import qmpblock
from qmpblock.migration.states import Phase

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/migrate.schema.json").read_text())


async def test_the_report(begin, start_destination):
    source = await begin(machine(2))
    destination = await start_destination(source)
    async with both(source, destination) as vms, qmpblock.migrate(*vms, speed=16 * MIB) as job:
        async for _ in job:
            pass
    told = job.result
    await arrived(source, destination, told)

    phases = {one.phase: one for one in told.phases}
    assert list(phases) == [one.value for one in Phase]
    assert sum(one.seconds for one in told.phases) == pytest.approx(told.seconds, abs=1)
    assert sum(one.bytes for one in told.phases) == told.transferred + sum(
        one.copied for one in told.disks
    )
    mirroring = phases["mirroring"]
    assert mirroring.bytes >= 2 * 8 * MIB
    assert mirroring.rate == pytest.approx(mirroring.bytes / mirroring.seconds)
    assert phases["memory"].bytes > 0
    for disk in told.disks:
        assert disk.course.began >= phases["checked"].seconds
        assert disk.course.seconds <= mirroring.seconds
        assert disk.course.rate * disk.course.seconds >= 8 * MIB
        assert disk.course.moments[-1][1] == disk.copied
    assert told.passes
    assert sum(one.sent for one in told.passes) <= told.transferred

    # QEMU's own count, the stamps of its events, and our clock are of one standstill.
    print(told.qemu_downtime, told.downtime, told.longest_stall)
    assert 0 < told.qemu_downtime < told.downtime + 1  # QEMU begins to count before it stops
    assert told.longest_stall == pytest.approx(told.downtime, abs=1)
    assert told.longest_stall == pytest.approx(told.resumed - told.stopped)
    before = sum(phases[name].seconds for name in ("checked", "mirroring", "ready"))
    assert before < told.stopped < before + phases["memory"].seconds
    assert told.seconds - phases["handed"].seconds < told.resumed < told.seconds


async def test_the_timeline_is_drawn_and_no_image_is_drawn_over(begin, start_destination, vm_dir):
    source = await begin()
    destination = await start_destination(source)
    image = source.disks[0].active.path
    words = (source.monitor_path, destination.monitor_path, "--json", "--svg")
    code, out, err = await cli("migrate", *words, str(image))
    assert (code, out) == (2, "")
    assert "it exists, and holds something else" in err
    assert (await destination.execute("query-status"))["status"] == "inmigrate"

    file = vm_dir / "timeline.svg"
    code, out, err = await cli("migrate", *words, str(file))
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    said = {one.text for one in ET.fromstring(file.read_text()).iter() if one.text}
    assert {"checked", "mirroring", "vd0", "memory", "held", "handed"} <= said
    assert any(one.startswith("the guest stands: ") for one in said)
    await arrived(source, destination, SimpleNamespace(**told | {"phases": [], "warnings": ()}))
