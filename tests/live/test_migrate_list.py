"""Many migrations at once, of a list: each for itself, and again where one failed."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from chains import cli
from jsonschema import Draft202012Validator
from migrating import machine, stressed

from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "schema/migrate-list.schema.json").read_text())


@pytest.fixture
def pairs(start_qemu, start_destination, vm_dir, qemu_binary):
    """Return what starts so many pairs, and the lines of their list."""

    async def start(number):
        made, lines = [], []
        for one in range(number):
            place = vm_dir / f"source{one}"
            built = await build(parse_scenario(machine(), "source"), place, Tools.of(qemu_binary))
            source = await stressed(await start_qemu(built, guest=True), 100)
            destination = await start_destination(source)
            made.append((source, destination))
            lines.append(
                f"  - {{source: {source.monitor_path}, destination: {destination.monitor_path}}}\n"
            )
        return made, lines

    return start


async def status(vm):
    return (await vm.execute("query-status"))["status"]


async def test_one_of_three_fails_and_is_made_up_for(pairs, start_destination, vm_dir):
    made, lines = await pairs(3)
    source, destination = made[1]
    destination.expect_exit()
    await destination.kill()
    file = vm_dir / "list.yaml"
    file.write_text("parallel: 2\nvms:\n" + "".join(lines))

    code, out, err = await cli("migrate", "--list", str(file), "--json")
    assert code == 1
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    assert [one["state"] for one in told["migrations"]] == ["done", "failed", "done"]
    assert f"{source.monitor_path} to {destination.monitor_path}: failed: " in err
    assert [await status(one) for one, _ in made] == ["postmigrate", "running", "postmigrate"]
    assert [await status(made[n][1]) for n in (0, 2)] == ["running", "running"]

    another = await start_destination(source)
    await made[0][0].quit()  # one that was sent away, and has been ended since
    file.write_text(file.read_text().replace(destination.monitor_path, another.monitor_path))
    code, out, err = await cli("migrate", "--list", str(file))
    assert code == 4, err
    assert "see that it is this one" in err
    assert "3 migrations: 1 gone over, 1 there already, 1 presumably there already" in out
    assert [await status(vm) for vm in (made[0][1], another, made[2][1])] == ["running"] * 3


async def test_all_together_keep_to_the_limit_of_the_list(pairs, vm_dir):
    _made, lines = await pairs(2)
    file, speed = vm_dir / "list.yaml", 4 << 20
    file.write_text(f"parallel: 2\nspeed: {speed}\nvms:\n" + "".join(lines))
    code, out, err = await cli("migrate", "--list", str(file), "--json")
    assert code == 0, err
    rate = 0.0
    for one in json.loads(out)["migrations"]:
        [mirroring] = [at for at in one["result"]["phases"] if at["phase"] == "mirroring"]
        assert mirroring["bytes"] > 7 << 20  # its disk holds so much
        rate += mirroring["rate"]
    print(f"{rate / speed:.2f} of the limit")
    assert rate < 1.3 * speed


async def test_a_guest_that_went_elsewhere_is_not_said_to_be_there(pairs, vm_dir):
    made, lines = await pairs(2)
    file = vm_dir / "list.yaml"
    file.write_text("vms:\n" + "".join(lines))
    code, _, err = await cli("migrate", "--list", str(file))
    assert code == 0, err
    (one, at), (other, there) = made
    crossed = [(one, there), (other, at)]
    file.write_text(
        "vms:\n"
        + "".join(
            f"  - {{source: {a.monitor_path}, destination: {b.monitor_path}}}\n" for a, b in crossed
        )
    )
    code, out, _ = await cli("migrate", "--list", str(file))
    assert code == 1
    assert "2 migrations: 2 failed" in out


async def test_interrupted_all_guests_stay(pairs, vm_dir):
    made, lines = await pairs(2)
    file = vm_dir / "list.yaml"
    file.write_text("parallel: 2\nspeed: 1M\nvms:\n" + "".join(lines))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "migrate", "--list", str(file)),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        for source, _ in made:
            while not await source.execute("query-jobs"):
                await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    for source, destination in made:
        assert await source.execute("query-jobs") == []
        assert (await status(source), await status(destination)) == ("running", "inmigrate")
