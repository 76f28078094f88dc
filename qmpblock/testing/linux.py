"""LinuxGuest: a small Linux in a real QEMU, for what the tiny guest cannot do.

It answers ACPI (power-off, hot-plug of PCI disks), has shell tools and a page cache. It is
booted once for each QEMU and saved to a file by migration; each test restores it::

    image = await LinuxImage.prepare()               # seconds at first, then milliseconds
    async with image.restore() as linux:             # about 0.3 s under TCG
        await linux.vm.execute("blockdev-add", node_name="d0", driver="qcow2", file=...)
        path = await linux.attach("d0", id="v0")     # hot-plugged: "/dev/vda"
        await linux.check(f"dd if=/dev/zero of={path} bs=64k count=1 conv=fsync")
        await linux.detach("v0")
        await linux.power_off()

The saved guest has no disk, because a disk's size and partitions would be saved with it:
disks are plugged in afterwards, and one file serves all tests.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qmpblock.errors import DisconnectedError, Error, RequestError, StalledError
from qmpblock.testing.guest_console import GuestConsole, evidence
from qmpblock.testing.images import find_qemu
from qmpblock.testing.linux_image import Boot, LinuxUnavailableError, build, default_cache
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scratch import leave, private_directory

__all__ = ["LinuxGuest", "LinuxImage", "LinuxUnavailableError", "ShellError"]

PORTS = 4
"""PCIe root ports: how many PCI disks can be plugged in at once."""

MEMORY = 128  # MiB: what it boots in; a page cache of some 60 MiB remains
COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr mitigations=off random.trust_cpu=on "
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests 8250.nr_uarts=1"
)

_BOOT_LIMIT = 120.0  # seconds without a sign of life; a cold boot takes about four
_SAVE_LIMIT = 60.0  # seconds
_KEEP = 30 * 86400  # seconds that the file of a QEMU that is not used any more stays
_POLL = 0.005


class ShellError(Error):
    """A command in the guest failed.

    :param code: its exit code.
    :param output: what it printed on both of its outputs.
    """

    def __init__(self, command: str, code: int, output: str) -> None:
        self.code = code
        self.output = output
        super().__init__(f"in the guest, {command!r} ended with exit code {code}: {output.strip()}")


class _Shell(GuestConsole):
    """The guest's serial line, keeping the output of the command under way."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.output: list[str] = []

    def _take(self, line: str) -> None:
        if line.startswith("|"):
            self.output.append(line[1:])
        super()._take(line)


class LinuxGuest:
    """A running Linux guest; `LinuxImage.restore` makes one.

    One command runs at a time. After a StalledError the guest still works on the command,
    and cannot be used any more.
    """

    def __init__(self, vm: QemuProcess, shell: _Shell) -> None:
        self.vm = vm
        self._shell = shell
        self._number = 0
        self._turn = asyncio.Lock()
        self._ports: dict[str, int] = {}

    async def run(self, command: str, timeout: float = 60.0) -> tuple[int, str]:
        """Run a shell command in the guest; return its exit code and its output.

        Both outputs, interleaved, the last 64 KiB.

        :raise StalledError: it did not end within `timeout` seconds.
        :raise GuestError: QEMU went away.
        """
        async with self._turn:
            self._number += 1
            number = self._number
            self._shell.output.clear()
            encoded = base64.b64encode(command.encode() + b"\n").decode()
            await self._shell.send(f"{number} {encoded}")
            _, code = await self._shell.wait(
                f"the end of {command!r}", lambda: self._shell.take_answer(number), timeout
            )
            output = base64.b64decode("".join(self._shell.output))
        return int(code), output.decode(errors="replace")

    async def check(self, command: str, timeout: float = 60.0) -> str:
        """Run a shell command that has to succeed; return its output.

        :raise ShellError: its exit code is not 0.
        :raise StalledError, GuestError: as `run`.
        """
        code, output = await self.run(command, timeout)
        if code:
            raise ShellError(command, code, output)
        return output

    async def attach(
        self,
        node: str,
        *,
        id: str,  # noqa: A002 - QEMU's word
        driver: str = "virtio-blk-pci",
        timeout: float = 30.0,
        **properties: object,
    ) -> str:
        """Plug a disk in and wait until the guest has it; return its path there.

        :param node: the root node, added by the caller.
        :param id: the device's.
        :param driver: a PCI device gets a free root port; anything else names its `bus`
            (`driver="scsi-hd", bus="scsi0.0"`).
        :raise RequestError: all root ports are taken.
        :raise CommandError: QEMU refused.
        :raise StalledError: the guest did not see it.
        """
        if "bus" not in properties:
            taken = set(self._ports.values())
            free = [port for port in range(PORTS) if port not in taken]
            if not free:
                raise RequestError(f"all {PORTS} root ports of the Linux guest are taken")
            self._ports[id] = free[0]
            properties["bus"] = f"port{free[0]}"
        before = set((await self.check("ls /sys/block")).split())
        try:
            await self.vm.execute("device_add", driver=driver, id=id, drive=node, **properties)
        except Error:
            self._ports.pop(id, None)
            raise
        deadline = time.monotonic() + timeout
        while not (new := set((await self.check("ls /sys/block")).split()) - before):
            if time.monotonic() > deadline:
                raise StalledError(f"the Linux guest did not see {id} for {timeout:g} s")
            await asyncio.sleep(_POLL)
        return f"/dev/{new.pop()}"

    async def detach(self, id: str, timeout: float = 30.0) -> None:  # noqa: A002 - QEMU's word
        """Ask the guest to give a disk back, and wait until it is unplugged.

        :raise StalledError: DEVICE_DELETED did not come in time.
        """
        with self.vm.control.subscribe(
            "DEVICE_DELETED", match=lambda event: event["data"].get("device") == id
        ) as deleted:
            await self.vm.execute("device_del", id=id)
            await deleted.get(timeout)
        self._ports.pop(id, None)

    async def power_off(self, timeout: float = 60.0) -> int:
        """Press the power button and wait until QEMU has ended; return its exit code.

        :raise TimeoutError: the guest did not power off in time.
        """
        self.vm.expect_exit()
        await self.vm.execute("system_powerdown")
        return await self.vm.wait(timeout)


@dataclass(frozen=True, slots=True)
class LinuxImage:
    """A Linux guest that has booted on one QEMU, in a file.

    :param qemu: that QEMU. No other can restore it for sure.
    :param boot: its kernel and initramfs.
    :param snapshot: the migration stream.
    :param options: more QEMU options, of the machine that was saved.
    """

    qemu: str
    boot: Boot
    snapshot: Path
    options: tuple[str, ...] = ()

    @classmethod
    async def prepare(
        cls,
        qemu: str | None = None,
        cache: Path | None = None,
        *,
        options: Sequence[str] = (),
    ) -> Self:
        """Return the image for a QEMU from the cache; download and boot it first if need be.

        Two that prepare at once wait for each other. Cancelling leaves the cache as it was.

        :param qemu: default: the QEMU under test.
        :param cache: default: `$QMPBLOCK_CACHE`, or `qmpblock` in the user's cache folder.
        :param options: more QEMU options, for a machine that another QEMU knows, too.
        :raise LinuxUnavailableError: the packages cannot be had here; a test is to be skipped.
        :raise QemuFailure: QEMU did not start, or ended.
        :raise StalledError: the guest did not start.
        """
        program = qemu or find_qemu()
        folder = (cache or default_cache()) / "linux"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            async with _locked(folder / ".lock"):
                boot = await asyncio.to_thread(build, folder)
                saved = folder / f"saved-{_key(program, boot, options)}"
                image = cls(program, boot, saved, tuple(options))
                if not image.snapshot.exists():
                    await image._save()
                image.snapshot.touch()
        except OSError as error:
            raise LinuxUnavailableError(f"the cache {folder} cannot be used: {error}") from error
        return image

    @asynccontextmanager
    async def restore(self, extra: Sequence[str] = ()) -> AsyncIterator[LinuxGuest]:
        """Start a QEMU that goes on where the saved guest was; it ends with the context.

        :param extra: more QEMU options; no devices, for the saved guest has none.
        :raise QemuFailure: QEMU did not start, did not take the file, or did not end cleanly.
        """
        incoming = ["-incoming", f"exec:cat {shlex.quote(str(self.snapshot))}"]
        async with self._start([*incoming, *extra]) as (vm, shell):
            await self._restored(vm)
            await vm.execute("cont")
            yield LinuxGuest(vm, shell)

    @asynccontextmanager
    async def waiting(self, extra: Sequence[str] = ()) -> AsyncIterator[LinuxGuest]:
        """Start a QEMU to which a guest that was restored can be migrated: -S -incoming defer.

        What is yielded answers once that guest has come, and runs.

        :param extra: more QEMU options: each disk, at the port where the guest has it.
        :raise QemuFailure: QEMU did not start, or did not end cleanly.
        """
        async with self._start(["-S", "-incoming", "defer", *extra]) as (vm, shell):
            yield LinuxGuest(vm, shell)

    async def _restored(self, vm: QemuProcess) -> None:
        deadline = time.monotonic() + _SAVE_LIMIT
        while True:
            try:
                if (await vm.execute("query-status"))["status"] != "inmigrate":
                    return
            except DisconnectedError as error:
                await vm.wait(_SAVE_LIMIT)
                raise vm.failure(
                    f"QEMU did not take the saved guest (remove {self.snapshot} to make it anew)"
                ) from error
            if time.monotonic() > deadline:
                raise StalledError(f"restoring the Linux guest took more than {_SAVE_LIMIT:g} s")
            await asyncio.sleep(_POLL)

    async def _save(self) -> None:
        """Boot the guest and save it to `snapshot`, whole or not at all."""
        for old in self.snapshot.parent.glob("saved-*"):
            if time.time() - old.stat().st_mtime > _KEEP:
                old.unlink()
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self.snapshot.parent)
        os.close(descriptor)
        try:
            async with self._start([]) as (vm, shell):
                await shell.wait("the Linux guest's start", shell.take_ready, _BOOT_LIMIT)
                await vm.execute("stop")
                await vm.execute("migrate", uri=f"exec:cat > {shlex.quote(name)}")
                await self._saved(vm)
                # A QEMU that has migrated its guest away has given up its disks: nothing to end.
                await vm.kill()
            Path(name).replace(self.snapshot)
        finally:
            Path(name).unlink(missing_ok=True)

    async def _saved(self, vm: QemuProcess) -> None:
        deadline = time.monotonic() + _SAVE_LIMIT
        while (info := await vm.execute("query-migrate")).get("status") != "completed":
            if info.get("status") in ("failed", "cancelled"):
                raise vm.failure(f"saving the Linux guest failed: {info.get('error-desc')}")
            if time.monotonic() > deadline:
                raise StalledError(f"saving the Linux guest took longer than {_SAVE_LIMIT:g} s")
            await asyncio.sleep(_POLL)

    @asynccontextmanager
    async def _start(self, extra: Sequence[str]) -> AsyncIterator[tuple[QemuProcess, _Shell]]:
        directory = private_directory()
        try:
            async with _Shell.listen(directory / "serial") as shell:
                machine = _machine(self.boot, directory / "serial")
                options = [*machine, *self.options, *extra]
                vm = QemuProcess(machine="q35", qemu=self.qemu, directory=directory, extra=options)
                async with vm:
                    try:
                        yield vm, shell
                    except Error as error:
                        error.add_note(evidence(shell.transcript))
                        raise
        finally:
            leave(directory)


def _machine(boot: Boot, serial: Path) -> list[str]:
    """Return the options that make QemuProcess's machine one for Linux: the later one holds."""
    ports = [
        word
        for port in range(PORTS)
        for word in ("-device", f"pcie-root-port,id=port{port},chassis={port + 1}")
    ]
    return [
        *("-bios", "bios-256k.bin", "-m", str(MEMORY), "-cpu", "max"),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", COMMAND_LINE),
        *("-chardev", f"socket,id=serial,path={serial}", "-serial", "chardev:serial"),
        *("-device", "virtio-scsi-pci,id=scsi0", *ports),
    ]


def _key(qemu: str, boot: Boot, options: Sequence[str]) -> str:
    """Name what a saved guest depends on: this very QEMU, the kernel and the machine."""
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True)
    program = Path(shutil.which(qemu) or qemu).resolve()
    facts = [version.stdout, str(program), os.environ.get("QMPBLOCK_ACCEL") or "tcg"]
    for path in (program, boot.kernel, boot.initrd):
        status = path.stat()
        facts.append(f"{status.st_size} {status.st_mtime_ns}")
    facts += [*_machine(boot, Path("serial")), *options]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold a lock file without blocking the event loop."""
    with path.open("w") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(0.05)
        yield
