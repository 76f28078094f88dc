"""What the live tests of snapshot, stream and commit share.

A `Subject` is one disk of a running VM: what it held before, which images it is made of, and
a guest that writes to it all the time. When the VM has ended, `Subject.verify` looks at the
images as whoever finds them would: by what their headers record.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chaincases import Case
from chainwriters import STAMPED, Area, DeviceWriter, StampWriter, quiet_area
from forking import forked

import qmpblock
from qmpblock.errors import BusyError
from qmpblock.testing.images import (
    BuiltDisk,
    BuiltImage,
    BuiltScenario,
    Tools,
    build,
    content_digest,
)
from qmpblock.testing.scenario import Image


class Subject:
    """One disk of a running VM, with all that is known of it."""

    def __init__(self, built: BuiltScenario, disk: BuiltDisk, before: Path) -> None:
        self.scenario = built.scenario
        self.directory = built.directory
        self.tools = built.tools
        self.disk = disk
        self.layers = disk.active.chain()
        self.images = list(self.layers)  # every one there ever was
        self.area = quiet_area(before)
        self.digest = digest_without(before, self.area)
        self.vm: Any = None
        self.path = ""
        self.writer: StampWriter | DeviceWriter | None = None
        self._files: dict[Path, str] = {}

    async def attach(self, vm: Any) -> None:
        """Find the disk in the VM that runs now, and start to write."""
        self.vm = vm
        self.path = await vm.io.qom_path(self.disk)
        number = await vm.io.guest_number(self.disk)
        if number is None:
            assert self.disk.spec.attach.device not in STAMPED, "the guest does not see its disk"
            self.writer = DeviceWriter(vm, self.disk, self.area)
        else:
            self.writer = StampWriter(vm, self.disk, self.area, number)
        await self.writer.start()
        self.remember()

    def remember(self) -> None:
        """Remember every file of the chain that the guest does not write to."""
        self._files = {
            path: content_digest(path) for layer in self.layers[1:] for path in files_of(layer)
        }

    def changed_files(self) -> set[Path]:
        """Return the files that are not what they were."""
        return {path for path, digest in self._files.items() if content_digest(path) != digest}

    async def keeps_writing(self) -> None:
        """Wait until the guest has had some more writes acknowledged."""
        assert self.writer is not None  # attach() made it
        begin = await self.writer.written()
        async with asyncio.timeout(60):
            while await self.writer.written() < begin + 10:
                await asyncio.sleep(0.005)

    def add_overlay(self, path: Path, fmt: str, naming: str = "relative") -> None:
        """Take a snapshot's overlay into account."""
        below = self.layers[0]
        secret = below.secret if fmt == "qcow2" else None
        spec = Image(
            path.name,
            fmt,
            below.spec.size,
            backing_name=naming,
            options=(("encrypt.format", "luks"),) if secret else (),
            secret=secret[1] if secret else None,
        )
        overlay = BuiltImage(spec, path, backing=below, secret=secret)
        self._set([overlay, *self.layers])
        self.images.append(self.layers[0])

    def copy_at(self, path: Path, fmt: str) -> BuiltImage:
        """Return a copy of the whole disk, encrypted as it is."""
        active = self.layers[0]
        secret = next((layer.secret for layer in self.layers if layer.secret), None)
        spec = Image(
            path.name,
            fmt,
            active.spec.size,
            options=(("encrypt.format", "luks"),) if secret else (),
            secret=secret[1] if secret else None,
        )
        return BuiltImage(spec, path, secret=secret)

    def move_to(self, copy: BuiltImage, *below: BuiltImage) -> None:
        """Take into account that the guest went over to a copy, which may lie on other layers."""
        self.images.append(copy)
        self._set([copy, *below])

    def apply(self, case: Case) -> None:
        """Take what `case` did into account.

        The layer whose header is rewritten records its new backing image as the layer above
        that one did: relative stays relative. Never by a `json:` text.
        """
        keeper = case.top if case.operation == "stream" else case.top - 1
        layers = case.after(self.layers)
        if 0 <= keeper < len(layers) - 1:
            via = self.layers[self.layers.index(layers[keeper + 1]) - 1].spec
            naming = "absolute" if via.backing_name == "json" else via.backing_name
            spec = replace(layers[keeper].spec, backing_name=naming, backing_format=True)
            layers[keeper] = replace(layers[keeper], spec=spec)
        self._set(layers)

    def _set(self, layers: list[BuiltImage]) -> None:
        below: BuiltImage | None = None
        relinked = []
        for layer in reversed(layers):
            below = replace(layer, backing=below)
            relinked.append(below)
        self.layers = relinked[::-1]

    def documented(self, *, before: list[str], made: str = "") -> str:
        """Return a pattern of what may differ in the VM when a change is done.

        Nodes, edges and devices of this disk; files of the chain as it was closed, as it is
        now opened; and the overlay that was `made`. No job, export, object, socket, bitmap.
        """
        own = rf"(?:{self.disk.spec.name}(?:-\d+)?(?:-file|-data|-throttle|-copy-on-read)?|#block"
        own += r"|qmpblock-[0-9a-f]{8}-(?:to-)?\d+(?:-file)?)" if made else ")"
        lines = [
            rf"node: {own} ",
            rf"edge: (?:{own} -(?:file|backing|data-file)->|\S+ -root->) {own} ",
            rf"device: \S+ (?:\(\S+\) )?holds (?:{own}|drive-{self.disk.spec.name})$",
        ]
        known = "|".join(re.escape(file) for file in [*self.every_file(), *before])
        closed = rf"disappeared: (?:open file: (?:{known}) for )"
        opened = rf"appeared: (?:open file: (?:{known}) for )"
        new = [rf"appeared: file: {re.escape(made)}$"] if made else []
        both = rf"(?:dis)?appeared: (?:{'|'.join(lines)})"
        return "^(?:" + "|".join([both, closed, opened, *new]) + ")"

    def every_file(self) -> list[str]:
        """Return the files of the chain, data files too."""
        return [str(path) for layer in self.layers for path in files_of(layer)]

    @property
    def files(self) -> list[str]:
        """Return the chain's file names, the active one first."""
        return [str(layer.path) for layer in self.layers]

    async def verify(self) -> None:
        """Check the closed images: what they record, what they hold, that none is damaged."""
        await self.verify_images()
        await self._verify_content()

    async def verify_images(self) -> None:
        """Check what `verify` does, but for the content."""
        for layer in self.layers:
            await self._verify_header(layer)
        for image in self.images:
            await image.check(self.tools)

    async def _verify_header(self, layer: BuiltImage) -> None:
        driver = ["-f", layer.spec.format, str(layer.path)]
        printed = await self.tools.run(self.tools.img, "info", "--output=json", *driver)
        info = json.loads(printed)
        recorded = info.get("backing-filename")
        if layer.backing is None:
            assert recorded is None, recorded
            return
        assert recorded is not None, f"{layer.path} records no backing image"
        naming = layer.spec.backing_name
        if recorded.startswith("json:"):
            assert naming == "json", recorded
            full = json.loads(recorded.removeprefix("json:"))["file"]["filename"]
        else:
            assert naming == ("absolute" if recorded.startswith("/") else "relative"), recorded
            full = info.get("full-backing-filename", recorded)
        assert Path(full).resolve() == layer.backing.path.resolve(), layer.path
        if layer.spec.format == "qcow2" and layer.spec.backing_format:
            assert info["backing-filename-format"] == layer.backing.spec.format

    async def _verify_content(self) -> None:
        active = self.layers[0]
        description = active.describe()
        if not any(one.secret for one in self.layers[1:]) and all(
            one.spec.backing_format for one in self.layers
        ):
            # As whoever finds the image opens it: the chain is what the headers say. Not so
            # where a backing image needs a key, or its format would have to be guessed.
            description.pop("backing", None)
        content = self.vm.directory / f"{self.disk.spec.name}.raw"
        await convert(self.tools, active, description, content)
        assert digest_without(content, self.area) == self.digest, "the content has changed"
        with content.open("rb") as file:
            file.seek(self.area.offset)
            self.writer.check(file.read(self.area.length))
        content.unlink()


def files_of(layer: BuiltImage) -> list[Path]:
    return [layer.path, *([layer.data_file] if layer.data_file else [])]


async def convert(tools: Tools, image: BuiltImage, description: dict[str, Any], to: Path) -> None:
    """Write what `description` of a closed image reads as into a raw file."""
    secrets = [
        word
        for name, data in image.secrets().items()
        for word in ("--object", f"secret,id={name},data={data.replace(',', ',,')}")
    ]
    source = "json:" + json.dumps(description)
    await tools.run(tools.img, "convert", *secrets, "-O", "raw", source, str(to))


def digest_without(path: Path, area: Area) -> str:
    """Hash a raw file, with zeros where the writer may write."""
    with path.open("r+b") as file:
        file.seek(area.offset)
        held = file.read(area.length)
        file.seek(area.offset)
        file.write(bytes(area.length))
        file.flush()
        digest = content_digest(path)
        file.seek(area.offset)
        file.write(held)
    return digest


async def subjects(built: BuiltScenario, directory: Path) -> dict[str, Subject]:
    """Do the guest's later writes to the closed images, and say what each disk holds then."""
    found = {}
    for disk in built.disks:
        await disk.replay(built.tools)
        before = directory / "before.raw"
        await convert(built.tools, disk.active, disk.active.describe(), before)
        found[disk.spec.name] = Subject(built, disk, before)
        before.unlink()
    return found


async def nothing_left(vm: Any, every: Iterable[Subject], left: Iterable[BuiltImage] = ()) -> None:
    """Check that nothing of ours is in the VM but overlays, and nothing of what left the chain."""
    wanted = {file for one in every for file in one.every_file()}
    assert await vm.execute("query-jobs") == []
    assert await vm.execute("query-block-exports") == []
    names = [item["name"] for item in await vm.execute("qom-list", path="/objects")]
    assert not [name for name in names if name.startswith("qmpblock")]
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    # Another disk may still have it in its chain.
    closed = {str(path) for layer in left for path in files_of(layer)} - wanted
    for node in nodes:
        assert node["file"] not in closed, f"{node['node-name']} still uses {node['file']}"
        if node["node-name"].startswith("qmpblock-"):
            assert node["file"] in wanted or node["file"].startswith("json:"), node
    opened = set()
    for path in Path(f"/proc/{vm.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            opened.add(os.readlink(path))
    assert not opened & closed
    assert opened >= wanted
    state = Path(os.environ["QMPBLOCK_STATE"])
    assert not list(state.rglob("*.journal")), "a journal is left"
    for directory in vm.image_directories():
        assert not [path for path in directory.iterdir() if ".qmpblock-" in path.name]


async def dirty(vm: Any, node: str, name: str) -> set[int]:
    """Return the offsets of what a dirty bitmap says, in steps of its granularity.

    Through an NBD export, which wants a bitmap that does not record: a copy.
    """
    from qmpblock.nbd import Client

    [info] = [one for one in await bitmaps(vm, node) if one["name"] == name]
    step = info["granularity"]
    assert info["recording"], info
    add = {"node": node, "name": "copy", "granularity": step}
    await vm.execute("block-dirty-bitmap-add", **add, disabled=True)
    await vm.execute("block-dirty-bitmap-merge", node=node, target="copy", bitmaps=[name])
    socket = str(vm.directory / "dirty")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    export = {"id": "dirty", "type": "nbd", "node-name": node, "name": "dirty"}
    await vm.control.execute("block-export-add", {**export, "bitmaps": ["copy"]})
    context = "qemu:dirty-bitmap:copy"
    found, offset = set(), 0
    async with await Client.connect(socket, export="dirty", contexts=[context]) as client:
        while offset < client.size:
            for length, flags in (await client.block_status(offset, client.size - offset))[context]:
                if flags:
                    found |= set(range(offset - offset % step, offset + int(length), step))
                offset += int(length)
    await vm.execute("nbd-server-stop")
    await vm.execute("block-dirty-bitmap-remove", node=node, name="copy")
    return found


async def bitmaps(vm: Any, node: str) -> list[dict[str, Any]]:
    """Return QEMU's records of a node's dirty bitmaps."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    [info] = [one for one in nodes if one["node-name"] == node]
    found: list[dict[str, Any]] = info.get("dirty-bitmaps", [])
    return found


async def cli(*arguments: str) -> tuple[int, str, str]:
    """Run `qmpblock`; return its exit code, stdout and stderr."""
    return await forked(*arguments, environment={**os.environ, "COLUMNS": "100"})


# -- doing it


async def do_and_verify(scenario, name, case, start_qemu, invariant, vm_dir, qemu_binary):
    """Start the scenario, do what `case` says while its guests write; verify it live and closed."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    every = await subjects(built, vm_dir)
    subject = every[name]
    vm = await start_qemu(built, guest=True)
    for one in every.values():
        await one.attach(vm)
    await invariant.begin(vm)
    refusal = case.refusal(scenario, name, vm.version)
    before, layers = subject.every_file(), list(subject.layers)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(subject.path)
        filters = disk.chain.filters
        await subject.keeps_writing()
        if refusal is not None:
            await refused(disk, subject, case, refusal)
        elif case.operation in ("snapshot", "there-and-back"):
            overlay = subject.directory / f"{name}.overlay"
            await snapshot(disk, subject, overlay)
            if case.operation == "there-and-back":
                await subject.keeps_writing()
                await job(disk, subject, Case("commit", base=1))
        else:
            await job(disk, subject, case)
        await subject.keeps_writing()
        await disk.refresh()
        assert [layer.file for layer in disk.chain.layers] == subject.files
        assert [node.name for node in disk.chain.filters] == [node.name for node in filters]
    for one in every.values():
        await one.writer.stop()
    now = set(subject.files)
    await nothing_left(vm, every.values(), [one for one in layers if str(one.path) not in now])
    if case.operation == "there-and-back":
        invariant.expect(rf"^appeared: file: {subject.directory}/{name}\.overlay$")
    elif refusal is None:
        made = subject.files[0] if case.operation == "snapshot" else ""
        invariant.expect(subject.documented(before=before, made=made))
    await invariant.verify(vm)
    await vm.quit()
    for one in every.values():
        await one.verify()


async def snapshot(disk, subject, overlay):
    subject.remember()
    result = await disk.snapshot(overlay)
    [made] = result.overlays
    assert (made.file, made.frozen) == (str(overlay), subject.files[0])
    check_warnings(subject, result.warnings)
    subject.add_overlay(overlay, "qcow2")
    assert not subject.changed_files(), "snapshot changes no image"


def check_warnings(subject, warnings, moved=True):
    """Of what is lost as the guest moves on: copy-on-read of a -drive, which is no node."""
    attach = subject.disk.spec.attach
    lost = moved and attach.style == "drive" and "copy-on-read" in attach.filters
    assert ["copy-on-read" in warning for warning in warnings] == [True] * lost


async def job(disk, subject, case):
    """Stream or commit, and check all that is known at once."""
    before = subject.layers
    after = case.after(before)
    left = [str(layer.path) for layer in before if layer not in after]
    subject.remember()
    async with getattr(disk, case.operation)(**case.layers) as running:
        assert running.outcome is None
    outcome = running.outcome
    assert (outcome.operation, outcome.changed) == (case.operation, True)
    assert outcome.pivoted == (case.operation == "commit" and case.top == 0)
    assert list(outcome.left) == left
    assert outcome.active == str(after[0].path)
    home = after[0].path == subject.disk.active.path  # where the command line's options count
    check_warnings(subject, outcome.warnings, outcome.pivoted and not home)
    # Beside the layer that was written to, and the one whose header was, none has changed.
    keeper = case.top if case.operation == "stream" else case.top - 1
    written = {after[keeper].path} if keeper >= 0 else set()
    if case.operation == "commit":
        written.add(after[case.top].path)
    written |= {layer.data_file for layer in before if layer.path in written and layer.data_file}
    assert subject.changed_files() <= written
    subject.apply(case)


async def refused(disk, subject, case, refusal):
    subject.remember()
    with pytest.raises(qmpblock.Error) as caught:
        async with getattr(disk, case.operation)(**case.layers):
            raise AssertionError("it was started")
    assert type(caught.value) is refusal
    assert caught.value.exit_code == (1 if refusal is BusyError else 2)
    assert "nothing was touched" in str(caught.value)
    assert not subject.changed_files()
