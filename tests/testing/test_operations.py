"""One line, one operation (or many of the same); wrong lines are in test_scenario."""

from __future__ import annotations

from qmpblock.testing.operations import Operation
from qmpblock.testing.scenario import parse_scenario


def test_operations() -> None:
    scenario = parse_scenario(
        "about: Ops.\nimages:\n- {size: 8M, content: [write 0x 1 0x1]}\n".replace(
            "write 0x 1 0x1", "write 1K 512 0xfe"
        )
        + "- {content: [zero 1M+512 1K unmap, write 0 4K Z every 8K times 3, snapshot s]}\n"
        "guest: [discard 0 64K, flush]\n",
        "t",
    )
    base, overlay = scenario.disks[0].images
    assert base.content == (Operation("write", 1024, 512, 0xFE),)
    assert overlay.content == (
        Operation("zero", (1 << 20) + 512, 1024, unmap=True),
        *(Operation("write", offset, 4096, ord("Z")) for offset in (0, 8192, 16384)),
        Operation("snapshot", name="s"),
    )
    assert [operation.verb for operation in scenario.disks[0].guest] == ["discard", "flush"]


def test_an_operation_knows_its_end() -> None:
    assert Operation("discard", 512, 1024).end == 1536
