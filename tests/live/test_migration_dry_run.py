"""A migration that is not made: what is said of it, and that nothing was changed."""

import json
from pathlib import Path

import pytest
from chains import cli
from jsonschema import Draft202012Validator

from qmpblock.migration.measure import measure
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

MIB = 1 << 20
SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs/schema/migration-plan.schema.json").read_text()
)
TEXT = "about: One disk.\nimages:\n  - {size: 64M, content: [write 0 8M 0xaa]}\n"
EMPTY = "about: Its target.\nimages:\n  - {size: 64M}\n"
ASKS = ("query-", "qom-get", "qom-list", "x-debug-query-", "qmp_capabilities", "calc-dirty-rate")
#: What a map takes: an export for a moment, and its lock.
OF_A_MAP = {
    *("object-add", "getfd", "nbd-server-start", "block-export-add"),
    *("block-export-del", "closefd", "nbd-server-stop", "object-del"),
}
#: What measuring the wire takes, past all images.
OF_THE_WIRE = {"blockdev-add", "blockdev-del", "blockdev-backup", "job-dismiss", "job-cancel"}


@pytest.fixture
def pair(start_qemu, vm_dir, qemu_binary):
    """Return what starts a source, and a destination that fits it but for the `extra` words."""

    async def start(*, guest=False, extra=(), memory="160"):
        tools = Tools.of(qemu_binary)
        built = await build(parse_scenario(TEXT, "source"), vm_dir / "source", tools)
        empty = await build(parse_scenario(EMPTY, "target"), vm_dir / "target", tools)
        more = [] if guest else ["-m", memory]
        source = await start_qemu(built, guest=guest, extra=more)
        destination = await start_qemu(
            empty, guest=guest, incoming="defer", extra=["-S", *more, *extra]
        )
        return source, destination

    return start


def asked(vm):
    """Return the commands that somebody gave this QEMU, but those that only ask; `info` is one."""
    lines = [line.split(" ", 3) for line in vm.qmp_log()]
    said = [json.loads(text) for _, who, way, text in lines if way == ">" and who != "control"]
    assert said
    human = [one["arguments"]["command-line"] for one in said if "human" in one["execute"]]
    assert all(line.startswith("info ") for line in human)
    return {one["execute"] for one in said if not one["execute"].startswith((*ASKS, "human-"))}


async def dry_run(source, destination, *words):
    """Run the command; return its exit code, its document and what it said."""
    code, out, err = await cli(
        "migrate", source.monitor_path, destination.monitor_path, "--dry-run", "--json", *words
    )
    document = json.loads(out)
    Draft202012Validator(SCHEMA).validate(document)
    return code, document, err


async def test_a_pair_that_fits(pair):
    source, destination = await pair()
    code, plan, said = await dry_run(source, destination, "--speed", "16M")
    assert (code, plan["findings"], plan["refused"], said) == (0, [], False, "")
    [disk] = plan["disks"]
    assert (disk["size"], disk["data"], disk["written"]) == (64 * MIB, 8 * MIB, 0)
    assert disk["target"].startswith(str(destination.disks[0].active.path.parent))
    assert (plan["memory"], plan["dirtied"]) == (160 * MIB, 0)
    expected = plan["prediction"]
    assert expected["converges"] is True
    assert (expected["disks"], expected["memory"]) == (0.5, 10)
    assert expected["seconds"] == pytest.approx(10.5 + expected["downtime"])
    assert plan["wire"]["rate"] > 16 * MIB
    assert 0 < plan["wire"]["latency"] < 0.1
    assert asked(source) <= OF_A_MAP | OF_THE_WIRE
    assert asked(destination) <= OF_A_MAP | OF_THE_WIRE

    code, plan, _ = await dry_run(source, destination, "--memory-only")
    assert (code, plan["refused"]) == (2, True)  # both have an image of their own
    assert [one["name"] for one in plan["findings"]] == ["disk-apart"]
    assert (plan["disks"], plan["prediction"]) == ([], None)


async def test_a_pair_that_does_not_fit_is_refused_in_words(pair):
    source, destination = await pair(extra=["-smp", "2", "-device", "virtio-rng-pci,addr=9"])
    arguments = ("migrate", source.monitor_path, destination.monitor_path, "--dry-run")
    code, _, err = await cli(*arguments)
    assert code == 2
    assert "refused: the source has 1 CPUs, the destination 2" in err
    assert "refused: only the destination has a virtio-rng-pci at PCI 09.0" in err
    assert "QEMU would notice never: the guest finds it" in err
    assert asked(source) == asked(destination) == set()


async def test_a_guest_that_outruns_the_wire(pair):
    """Its writes are measured, and what it would take is said."""
    source, destination = await pair(guest=True)
    await source.guest.stress(
        StressSpec(offset=32 * MIB, blocks=512, block_size=4096, queue_depth=4, rate=300)
    )
    async with Connection.open(source.monitor_path, NBDAccess()) as connection:
        load = await measure(connection, (await connection.graph()).disks(), 2)
    [written] = load.disks.values()
    assert 100_000 < written < 500 * 4096  # a busy host slows a guest down
    assert load.memory is None  # QEMU samples nothing of so little
    code, plan, _ = await dry_run(source, destination, "--speed", "100K")
    assert code == 0
    assert plan["prediction"]["converges"] is False
    assert "does not end" in plan["prediction"]["why"]
    assert plan["prediction"]["seconds"] is None
    _, out, _ = await cli("migrate", source.monitor_path, destination.monitor_path, "--dry-run")
    assert "there and back (measured)" in out
    await source.guest.stop_stress(0)
