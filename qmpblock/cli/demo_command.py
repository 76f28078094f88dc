"""`qmpblock demo`: the whole story in half a minute, on a real QEMU."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import click

from qmpblock.cli.app import Options, emit
from qmpblock.cli.app import command as make_command
from qmpblock.errors import Error, ToolError, UnsupportedError
from qmpblock.names import DEMO_FOLDER

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.testing.images import BuiltScenario
    from qmpblock.testing.qemu import QemuProcess
    from qmpblock.vm import VM, Disk

__all__ = ["command"]

_SCENARIO = """\
about: A chain of three images, and a guest that writes.
disks:
  - name: demo
    images:
      - {file: base.raw, format: raw, size: 64M, content: [write 0 20M 0x42, write 40M 8M 0x42]}
      - {file: middle.qcow2, content: [write 8M 8M 0x4d, zero 44M 8M]}
      - {file: active.qcow2, content: [write 12M 2M 0x41]}
    guest: [write 24M 6M 0x47, write 56M 1M 0x47, zero 2M 2M, flush]
"""
_CONTEXTS = ("base:allocation", "qemu:allocation-depth")


@make_command
@click.option("--qemu", metavar="PATH", help="The qemu-system-x86_64 to run.")
async def command(options: Options, qemu: str | None) -> None:
    """Boot a tiny guest on a chain of three images and map its disk while it writes.

    Each map is compared with what QEMU's own tools say of the same disk: `qemu-img map`
    of the closed images (to which the guest's writes were replayed), and `nbdinfo --map`
    of the running one. Needs QEMU, qemu-img, nbdinfo and qmpblock[testing]; leaves nothing.
    """
    from qmpblock.host.socketfolder import temporary_directory

    try:
        from qmpblock.testing.images import Tools, build, find_qemu
        from qmpblock.testing.qemu import QemuProcess
        from qmpblock.testing.scenario import parse_scenario
    except ImportError as error:
        raise UnsupportedError(
            f"the demo needs the test harness, and {error.name} is not installed",
            remedy="pip install 'qmpblock[testing]'",
        ) from None
    say = _say if not options.json else _quiet
    # An iothread-free disk: nbdinfo's own disconnect would abort QEMU before 10.0 (K1).
    scenario = parse_scenario(_SCENARIO, "demo")
    place = temporary_directory(f"{DEMO_FOLDER}xxxxxxxx/vm")
    with tempfile.TemporaryDirectory(prefix=DEMO_FOLDER, dir=place) as folder:
        tools = Tools.of(qemu or find_qemu())
        say("Making base.raw <- middle.qcow2 <- active.qcow2 ...")
        built = await build(scenario, Path(folder) / "images", tools)
        untouched = await build(scenario, Path(folder) / "untouched", tools)
        replayed = await built.replayed(Path(folder) / "replayed")
        directory = Path(folder) / "vm"
        directory.mkdir()
        process = QemuProcess.of(built, guest=True, qemu=qemu, directory=directory)
        async with process, options.connect(process.monitor_path) as vm:
            version = ".".join(map(str, vm.monitor.version))
            say(f"QEMU {version} runs a tiny guest on it. What its disk holds, at this moment:\n")
            [disk] = await vm.disks()
            first = await _stage(say, process, vm, disk, untouched)
            say("\nThe guest writes 7 MiB of data and 2 MiB of zeros ...\n")
            await process.guest_writes("demo")
            second = await _stage(say, process, vm, disk, replayed)
    stages = {"before": first, "after": second}
    if options.json:
        emit(json.dumps({"qemu": version, **stages}, indent=2) + "\n")
    if not all(result is not False for stage in stages.values() for result in stage.values()):
        raise Error("the maps differ; see above")
    say("\nThe guest ran on throughout, and nothing was left in its QEMU.")


async def _stage(
    say: Any, process: QemuProcess, vm: VM, disk: Disk, closed: BuiltScenario
) -> dict[str, Any]:
    """Map the disk, draw it, and compare; return the verdicts."""
    from qmpblock.extents.allocationmap import AllocationMap

    seen = await disk.map()
    _draw(say, seen, await disk.layers())
    expected = AllocationMap.from_qemu_img(
        await closed.disks[0].active.map(closed.tools), layers=len(disk.chain.layers)
    )
    verdicts: dict[str, Any] = {
        "extents": len(seen),
        "equals_qemu_img": seen == expected.without_reserved(),
    }
    verdicts.update(await _ask_nbdinfo(process, vm, disk))
    say("")
    _report(say, "qemu-img map (closed copy)", verdicts["equals_qemu_img"])
    for context in _CONTEXTS:
        _report(say, f"nbdinfo --map={context}", verdicts[f"equals_nbdinfo_{context}"])
    return verdicts


async def _ask_nbdinfo(process: QemuProcess, vm: VM, disk: Disk) -> dict[str, bool | None]:
    """Compare both contexts with nbdinfo's, through one export on a server of the demo's own."""
    from qmpblock.export.session import Request, exports
    from qmpblock.qemu.connection import NBDAccess

    if which("nbdinfo") is None:
        return {f"equals_nbdinfo_{context}": None for context in _CONTEXTS}
    answers: dict[str, bool | None] = {}
    socket = str(process.directory / "nbd")
    address = {"type": "unix", "data": {"path": socket}}
    await process.execute("nbd-server-start", addr=address)
    try:
        request = Request(disk.chain.active.node.name)
        access = NBDAccess(address=socket)
        async with exports(vm.monitor, disk.device, [request], access=access) as [client]:
            for context in _CONTEXTS:
                ours: list[list[int]] = []
                offset = 0
                while offset < client.size:
                    length = min(client.size - offset, client.max_status_length)
                    rows = (await client.block_status(offset, length))[context].tolist()
                    ours += rows
                    offset += sum(row[0] for row in rows)
                uri = f"nbd+unix:///{client.export}?socket={socket}"
                printed = await _output("nbdinfo", "--json", f"--map={context}", uri)
                theirs = [[r["length"], r["type"]] for r in json.loads(printed)]
                answers[f"equals_nbdinfo_{context}"] = _merged(ours) == _merged(theirs)
    finally:
        await process.execute("nbd-server-stop")
    return answers


async def _output(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    if process.returncode:
        raise ToolError(command, process.returncode, err.decode(errors="replace"))
    return out


def _merged(rows: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for length, flags in rows:
        if merged and merged[-1][1] == flags:
            merged[-1][0] += length
        else:
            merged.append([length, flags])
    return merged


def _draw(say: Any, seen: AllocationMap, layers: Any) -> None:
    from posixpath import basename

    from rich.console import Console

    from qmpblock.pictures.text import text_picture

    console = Console()
    named = [(basename(one.layer.file), one.map) for one in reversed(layers)]
    say(
        text_picture(
            named,
            seen,
            width=min(console.width, 100),
            ascii=not (console.encoding or "").lower().startswith("utf"),
            color=console.is_terminal and not console.no_color,
        ).rstrip("\n")
    )


def _report(say: Any, name: str, verdict: bool | None) -> None:
    words = {True: "equal", False: "DIFFERENT", None: "not compared: nbdinfo is not installed"}
    say(f"  {name:<36} {words[verdict]}")


def _say(text: str) -> None:
    click.echo(text)


def _quiet(text: str) -> None:
    """With --json, stdout holds one document and nothing else."""
