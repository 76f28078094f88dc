"""QemuProcess: one real QEMU, started for a test, whose every failure carries its evidence.

QEMU never outlives the test run: it is asked to quit or killed when its context ends, an
atexit handler kills what is left, and the kernel kills it if the test run itself is killed
(PR_SET_PDEATHSIG; it acts when the *thread* that started QEMU ends, so start it from the
main thread).
"""

from __future__ import annotations

import asyncio
import atexit
import difflib
import inspect
import os
import shlex
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from qmpblock.errors import (
    ConnectError,
    Error,
    GreetingError,
    MonitorError,
    RequestError,
    StalledError,
    ToolError,
    printable,
)
from qmpblock.host.processes import die_with_parent
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing.commandline import disk_arguments
from qmpblock.testing.diskio import DiskIO
from qmpblock.testing.images import BuiltDisk, BuiltScenario, find_qemu
from qmpblock.testing.loops import check_loop, running_loop
from qmpblock.testing.qmplog import QmpLog, hide_in_command, without_stamps
from qmpblock.testing.scratch import PATH_LIMIT, leave, private_directory

if TYPE_CHECKING:
    from qmpblock.testing.guest import GuestConsole, TinyGuest
    from qmpblock.testing.scenario import Operation

__all__ = ["QemuFailure", "QemuOptions", "QemuProcess", "check_options", "private_directory"]

_OUTPUT_LIMIT = 64 << 10  # bytes of stdout and of stderr that are shown, from the end
_START_LIMIT = 30.0  # seconds until the monitor answers; a loaded machine needs one
_POLL = 0.003  # seconds
_SOON = 1.0  # seconds for the run state
_TRIM = 1.0  # seconds between looks at the size of a log
MONITORS = ("control", "qmp", "qmp2", "report")
"""The QMP monitors: the harness's, two that are free, and one for telling of a failure."""

_KNOWN = 20  # QEMUs of which a failure may tell

_running: set[subprocess.Popen[bytes]] = set()
_known: list[QemuProcess] = []


def known() -> list[QemuProcess]:
    """Return the QEMUs that this process started, the last ones, in their order."""
    return list(_known)


def forget_ended() -> None:
    """Let go of those that are closed: what comes has nothing to do with them."""
    _known[:] = [vm for vm in _known if not vm.closed]


@atexit.register
def _kill_rest() -> None:
    for process in list(_running):
        if process.poll() is None:  # not reaped, so the pid is still this process
            process.kill()
            process.wait()


class QemuFailure(ToolError):  # noqa: N818 - the name is part of the API
    """QEMU could not be started, died, or did not end as it should.

    :param what: what failed.
    :param returncode: its exit code, negative for a signal; None if it still runs (the
        attribute, as in ToolError, is then 0).
    :param stdout: what it printed there; also `stderr`.
    """

    def __init__(
        self,
        what: str,
        command: Iterable[str],
        returncode: int | None,
        stdout: str,
        stderr: str,
    ) -> None:
        super().__init__(command, returncode or 0, stderr)
        self.stdout = stdout
        self.message = f"{what}\n{_evidence(self.command, returncode, stdout, stderr)}"
        self.args = (self.message,)


def _evidence(command: Iterable[str], returncode: int | None, stdout: str, stderr: str) -> str:
    ended = "still running"
    if returncode is not None:
        ended = str(returncode)
        if returncode < 0:
            ended += f" ({signal.Signals(-returncode).name})"
    lines = [f"exit code: {ended}", f"command: {shlex.join(hide_in_command(command))}"]
    for name, text in (("stderr", stderr), ("stdout", stdout)):
        shown = "\n".join(f"  {printable(line, 2000)}" for line in text.strip().splitlines())
        lines.append(f"{name}:\n{shown}" if shown else f"{name}: empty")
    return "\n".join(lines)


class QemuOptions(TypedDict, total=False):
    """The keywords of QemuProcess, and so those of the fixture `start_qemu`."""

    machine: str
    empty_tray: bool
    guest: bool
    incoming: str | None
    qemu: str | None
    directory: Path | None
    extra: Sequence[str]


def check_options(options: Mapping[str, object], more: Iterable[str] = ()) -> None:
    """Refuse a keyword that is none of `QemuOptions`, before anything is made.

    :param more: keywords that there are besides.
    :raise TypeError: there is one; the message says what may have been meant.
    """
    known = [*QemuOptions.__annotations__, *more]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise TypeError(f"a QEMU has no option {name!r}; {hint}")


class QemuProcess:
    """A QEMU with disks, three QMP monitors and an idle CPU (or a tiny guest).

    `async with QemuProcess(...) as vm:` starts it, and at the end asks it to quit. An
    exception inside gets the evidence as a note; a QEMU that died by itself is a
    QemuFailure.

    The harness holds one monitor (`control`); `monitor_path` and `second_monitor_path` are
    free for what is tested: one QMP monitor serves one client at a time.

    :param disks: attached in this order.
    :param machine: `pc`, `q35` or `microvm`.
    :param empty_tray: adds a CD-ROM drive without a medium.
    :param guest: run the tiny guest (`vm.guest`); otherwise the CPU halts at once, and
        nothing reads the disks (a BIOS would: copy-on-read would show it).
    :param incoming: wait for a migration there (`-incoming`). The tiny guest is then the one
        that comes; once it runs here, `attach_guest` takes it over.
    :param qemu: the program; None for the QEMU under test.
    :param directory: for sockets and output; None makes one, removed at the end.
    :param extra: more command line options.
    """

    def __init__(
        self,
        disks: Sequence[BuiltDisk] = (),
        *,
        machine: str = "pc",
        empty_tray: bool = False,
        guest: bool = False,
        incoming: str | None = None,
        qemu: str | None = None,
        directory: Path | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.disks = tuple(disks)
        self.machine = machine
        self.directory = directory or private_directory()
        self.monitor_path = str(self.directory / "qmp")
        self.second_monitor_path = str(self.directory / "qmp2")
        self.guest: TinyGuest | None = None
        self._console: GuestConsole | None = None
        self._io: DiskIO | None = None
        self._incoming = incoming is not None
        self._own_directory = directory is None
        self._control_path = str(self.directory / "control")
        self.report_path = str(self.directory / "report")
        self._control: Monitor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._expected_end = False
        self._printed: tuple[str, str] | None = None  # kept when the directory goes
        self._log: QmpLog | None = None
        self._logs = QmpLog.can_be(extra)
        self.closed = False
        if len(os.fsencode(self._control_path)) > PATH_LIMIT:
            raise RequestError(
                f"the directory {self.directory} is too long for a UNIX socket in it",
                remedy="use a shorter one, such as private_directory() makes",
            )
        self.command = (
            qemu or find_qemu(),
            *self._arguments(guest),
            *disk_arguments(self.disks, machine, empty_tray=empty_tray),
            *(("-incoming", incoming) if incoming is not None else ()),
            *extra,
        )

    @classmethod
    def of(cls, built: BuiltScenario, **options: Unpack[QemuOptions]) -> Self:
        """Make the QEMU of a scenario; `options` are those of the class.

        :raise TypeError: an option that there is not.
        """
        check_options(options, inspect.signature(cls).parameters)  # a class of one's own has more
        scenario = built.scenario
        options.setdefault("machine", scenario.machine)
        options.setdefault("empty_tray", scenario.empty_tray)
        return cls(built.disks, **options)

    def _arguments(self, guest: bool) -> list[str]:
        if guest:
            from qmpblock.testing.guest import GuestConsole, guest_arguments

            self._console = GuestConsole(str(self.directory / "serial"))
            arguments = guest_arguments(self._console.path, machine=self.machine)
        else:
            accel = os.environ.get("QMPBLOCK_ACCEL") or "tcg"
            arguments = ["-nodefaults", "-no-user-config", "-display", "none"]
            arguments += ["-accel", accel, "-m", "16", "-machine", self.machine]
            arguments += ["-bios", str(self.directory / "idle.rom")]
        for name in MONITORS:
            path = self.directory / name
            arguments += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
            # -mon says of itself that it is deprecated, from 11.1 on; -qmp does not.
            arguments += ["-qmp", f"chardev:{name}"]
        return arguments

    # -- life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None:
            if isinstance(value, MonitorError):
                await self._ended_within(1.0)  # it may be about to end: then say how
            value.add_note(self.evidence())
        try:
            if value is None:
                await self.quit()
        finally:
            await self.close()

    async def start(self) -> None:
        """Start QEMU and wait until its monitor answers.

        Cancelling kills it.

        :raise QemuFailure: it ended, or its monitor did not answer.
        :raise WrongLoopError: no event loop of asyncio's runs here.
        """
        self._loop = running_loop("a QEMU")
        if self._console is None:
            write_idle_rom(self.directory / "idle.rom")
        else:
            await self._console.open()
        command, descriptors = list(self.command), []
        if self._logs:
            self._log = QmpLog()
            command += self._log.arguments()
            descriptors = [self._log.descriptor]
        self.closed = False
        _known.append(self)
        del _known[:-_KNOWN]
        with (
            (self.directory / "stdout").open("wb") as out,
            (self.directory / "stderr").open("wb") as err,
        ):
            self._process = subprocess.Popen(  # noqa: ASYNC220 - its pid and pidfd outlive the loop
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.directory,
                pass_fds=descriptors,
                process_group=0,  # Ctrl-C is for the test run, which then ends QEMU in order
                preexec_fn=die_with_parent(),
            )
        _running.add(self._process)
        try:
            self._control = await self._connect_control()
            if self._log is not None:
                self._log.begin()
                self._trim(self._log)
            if self._console is not None:
                self._console.diagnose = self.diagnose
                self._console.run_state = self._run_state
            if self._console is not None and not self._incoming:
                self.guest = await self._wait_for_guest(self._console)
            self._make_io()
        except BaseException:
            await self.close()
            raise

    def _trim(self, log: QmpLog) -> None:
        if not self.closed:
            log.trim()
            asyncio.get_running_loop().call_later(_TRIM, self._trim, log)

    async def _connect_control(self) -> Monitor:
        assert self._process is not None  # start() made it
        deadline = asyncio.get_running_loop().time() + _START_LIMIT
        while True:
            if self._process.poll() is not None:
                raise self.failure("QEMU ended before its monitor answered")
            if Path(self._control_path).exists():
                try:
                    return await Monitor.connect(self._control_path, greeting_timeout=_START_LIMIT)
                except ConnectError:
                    pass  # bound, not yet listening; or gone: the next round knows
                except GreetingError as error:
                    if await self._ended_within(1.0):
                        continue  # it ended while it greeted: its own words say more
                    await self.kill()
                    raise self.failure(f"QEMU's monitor does not work: {error}") from error
            if asyncio.get_running_loop().time() > deadline:
                await self.kill()
                raise self.failure(f"QEMU's monitor did not answer for {_START_LIMIT:g} s; killed")
            await asyncio.sleep(_POLL)

    async def _wait_for_guest(self, console: GuestConsole) -> TinyGuest:
        from qmpblock.testing.guest import GuestError, TinyGuest

        try:
            return await TinyGuest.ready(console)
        except (GuestError, StalledError) as error:
            await self.kill()
            raise self.failure(f"the tiny guest did not start: {error}") from error

    async def attach_guest(self) -> TinyGuest:
        """Take over the tiny guest that has come by migration, and runs.

        :raise StalledError: it does not answer.
        """
        from qmpblock.testing.guest import TinyGuest

        assert self._console is not None, "started without a guest"
        self.guest = await TinyGuest.attach(self._console)
        self._make_io()
        return self.guest

    def _make_io(self) -> None:
        self._io = DiskIO(self.control, self.disks, self.directory / "stdout", self.guest)

    async def wait(self, timeout: float | None = None) -> int:
        """Wait until QEMU has ended; return its exit code (negative for a signal).

        :raise TimeoutError: it still runs after `timeout` seconds.
        """
        assert self._process is not None, "not started"
        if self._process.poll() is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            fd = os.pidfd_open(self._process.pid)
            loop.add_reader(fd, ended.set)
            try:
                async with asyncio.timeout(timeout):
                    await ended.wait()
            finally:
                loop.remove_reader(fd)
                os.close(fd)
        code = self._process.wait()
        _running.discard(self._process)
        return code

    async def _ended_within(self, seconds: float) -> bool:
        try:
            await self.wait(seconds)
        except TimeoutError:
            return False
        return True

    async def quit(self, timeout: float = 30.0) -> None:
        """End QEMU in order, unless it was killed or `expect_exit` was called.

        :raise QemuFailure: it had ended before, did not end within `timeout` seconds (it is
            killed then), or its exit code was not 0.
        """
        expected = self._expected_end
        if self._process is None or (expected and self._process.poll() is not None):
            return
        if self._process.poll() is not None:
            raise self.failure("QEMU had ended by itself")
        assert self._control is not None  # it was started
        self._expected_end = True
        try:
            async with asyncio.timeout(timeout):
                await self._control.execute("quit")
        except TimeoutError:
            await self.kill()
            raise self.failure(f"QEMU did not answer `quit` for {timeout:g} s; killed") from None
        except Error as error:
            # A QEMU that ends closes its monitors first: the kernel may take seconds for the rest.
            if await self._ended_within(timeout if expected else 1.0):
                if expected:
                    return
            else:
                await self.kill()
            raise self.failure(f"QEMU did not quit: {error}") from error
        try:
            code = await self.wait(timeout)
        except TimeoutError:
            await self.kill()
            raise self.failure(f"QEMU did not quit within {timeout:g} s; killed") from None
        if code != 0:
            raise self.failure("QEMU did not end cleanly")

    async def kill(self) -> int:
        """End QEMU with SIGKILL, as a crash of the host would; return its exit code."""
        assert self._process is not None, "not started"
        self._expected_end = True
        if self._process.poll() is None:
            self._process.kill()
        return await self.wait()

    def expect_exit(self) -> None:
        """Say that QEMU ending by itself is part of the test."""
        self._expected_end = True

    async def close(self) -> None:
        """Give everything back, killing QEMU if it runs. Idempotent."""
        if self._console is not None:
            await self._console.close()
        if self._control is not None:
            await self._control.close()
        if self._process is not None:
            await self.kill()
        self._put_away()

    def abandon(self) -> None:
        """Kill QEMU where nothing can be awaited, for the event loop is closed."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._put_away()

    def _put_away(self) -> None:
        self._printed = self._printed or (self.stdout, self.stderr)
        if self._log is not None:
            self._log.close()
        self.closed = True
        if self._own_directory:
            leave(self.directory)

    # -- what it is

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""
        assert self._control is not None, "not started"
        return self._control.version

    @property
    def control(self) -> Monitor:
        """The harness's own monitor.

        :raise WrongLoopError: another event loop runs here than where the VM was started.
        """
        assert self._control is not None, "not started"
        check_loop(self._loop, "this VM")
        return self._control

    def image_directories(self) -> list[Path]:
        """Return the directories that the images lie in."""
        layers = (layer for disk in self.disks for layer in disk.active.chain())
        return sorted({layer.path.parent for layer in layers})

    @property
    def io(self) -> DiskIO:
        """I/O on the disks, as the guest would do it.

        :raise WrongLoopError: as `control`.
        """
        assert self._io is not None, "not started"
        check_loop(self._loop, "this VM")
        return self._io

    @property
    def stdout(self) -> str:
        """What QEMU has printed so far (its end, if it is long)."""
        return self._printed[0] if self._printed else _read_end(self.directory / "stdout")

    @property
    def stderr(self) -> str:
        """What QEMU has printed on stderr so far (its end, if it is long)."""
        if self._printed:
            return self._printed[1]
        printed = _read_end(self.directory / "stderr")
        return without_stamps(printed) if self._logs else printed

    def secrets(self) -> list[str]:
        """Return the passphrases of the disks."""
        return [data for disk in self.disks for data in disk.active.secrets().values()]

    def qmp_log(self) -> list[str]:
        """Return what was said on all of its monitors, a message a line, without secrets.

        `2026-11-29T04:29:25.091488Z control > {"execute": ...}`: when, on which monitor, to QEMU
        (`>`) or from it. The harness's monitor is `control`, the others are `A`, `B`, ... as
        clients come. About the last mebibyte of it.
        """
        if not self._logs:
            return ["the log of QEMU is the caller's: -d, -D or -trace was given"]
        return [] if self._log is None else self._log.lines(self.secrets())

    @property
    def console(self) -> tuple[str, ...]:
        """The last lines of the tiny guest's serial port, `>` ours and `<` the guest's."""
        return () if self._console is None else self._console.transcript

    def evidence(self) -> str:
        """Return exit code, command line, stderr and stdout, for people."""
        return _evidence(self.command, self.returncode, self.stdout, self.stderr)

    def failure(self, what: str) -> QemuFailure:
        """Make a failure of this QEMU that carries the evidence."""
        return QemuFailure(what, self.command, self.returncode, self.stdout, self.stderr)

    async def _run_state(self) -> str | None:
        try:
            async with asyncio.timeout(_SOON):
                return str((await self.execute("query-status"))["status"])
        except (TimeoutError, Error):
            return None  # it says nothing: whoever waits goes on waiting

    async def diagnose(self) -> str:
        """Say why the guest hangs, for people; see `qmpblock.testing.hang`."""
        from qmpblock.testing.hang import diagnose

        if not self.running:
            return "QEMU has ended"
        return await diagnose(self.control, self.pid)

    # -- what it does

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command on the harness's monitor; `_` in names stands for `-`.

        :raise CommandError: QEMU refused it.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.control.execute(command, given or None)

    async def hmp(self, command: str) -> str:
        """Run a command of the human monitor and return what it printed."""
        printed = await self.execute("human-monitor-command", command_line=command)
        return str(printed)

    async def qemu_io(self, disk: BuiltDisk | str, command: str) -> str:
        """Do I/O through the guest device's own backend; see `diskio.DiskIO.qemu_io`."""
        return await self.io.qemu_io(self.disk(disk), command)

    async def qemu_io_at(self, path: str, command: str) -> str:
        """Do I/O likewise, through the backend at a QOM path: of a disk that no scenario made."""
        return await self.io.qemu_io_at(path, command)

    async def guest_writes(
        self, disk: BuiltDisk | str, operations: Iterable[Operation] | None = None
    ) -> None:
        """Do what the guest does later; see `diskio.DiskIO.perform`."""
        built = self.disk(disk)
        await self.io.perform(built, built.spec.guest if operations is None else operations)

    def disk(self, disk: BuiltDisk | str) -> BuiltDisk:
        """Return the disk of that name in the scenario (or the one that is given).

        :raise RequestError: there is none; the message lists those that there are.
        """
        if isinstance(disk, BuiltDisk):
            return disk
        known = {one.spec.name: one for one in self.disks}
        if disk not in known:
            raise RequestError(
                f"this VM has no disk {disk!r}; it has: {', '.join(known) or 'none'}"
            )
        return known[disk]

    async def guest_number(self, disk: BuiltDisk | str) -> int:
        """Return what the tiny guest calls a disk, as in `StressSpec(disk=...)`.

        :raise RequestError: no tiny guest runs, or it has no driver for the disk's device.
        """
        built = self.disk(disk)
        number = await self.io.guest_number(built)
        if number is None:
            raise RequestError(
                f"the guest does not see {built.spec.name} ({built.spec.attach.device})"
                if self.guest is not None
                else "no guest runs in this VM",
                remedy="start the VM with guest=True, and the disk on virtio-blk or virtio-scsi",
            )
        return number


def _read_end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _OUTPUT_LIMIT))
            return file.read().decode(errors="replace")
    except FileNotFoundError:  # not started, or its directory is gone
        return ""


def write_idle_rom(path: Path) -> None:
    """Write a firmware that halts the CPU at the reset vector: cli; hlt; jmp to the hlt."""
    rom = bytearray(64 << 10)
    rom[0xFFF0:0xFFF4] = b"\xfa\xf4\xeb\xfd"
    path.write_bytes(rom)
