"""The command group.

It imports a command's module only when that is run, and turns errors into messages and exit
codes (design.md, contracts): whatever happens, one message and never a traceback. All output
passes `emit`, `_complain` or click's echo; what their stream cannot write is escaped, and where it
cannot be written at all (`qmpblock.cli.standardio`) the work goes on.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from qmpblock._version import __version__
from qmpblock.errors import Error, printable

if TYPE_CHECKING:
    import asyncio

    from rich.console import RenderableType

    from qmpblock.vm import VM

__all__ = [
    "WARNED",
    "Options",
    "Rate",
    "Size",
    "command",
    "delivered",
    "emit",
    "pair",
    "run",
    "signals_go_to",
    "uncut",
    "unmanaged_option",
    "warn",
]

_COMMANDS = {
    "allocate": "Make a range of a running disk stand in its active layer, thin or in full.",
    "apply": "Make the disks of running VMs as a policy says.",
    "backup": "Back up disks of a running VM, all at one instant; list or check backups.",
    "commit": "Copy what upper layers of a running disk hold into a lower one, and drop them.",
    "copy": "Copy disks of a running VM into new images, all at one instant.",
    "demo": "Boot a tiny guest on a chain of three images and map its disk while it writes.",
    "disks": "List a VM's disks: their layers, filters, jobs and exports.",
    "doctor": "Say what is missing here, and which commands need it.",
    "export": "Run a command that reads disks of a running VM as they were when it began.",
    "job": "Steer a background job of ours: pause, resume, speed, cancel, complete, ...",
    "jobs": "List a VM's background jobs, ours and others'.",
    "map": "Show which layer holds every byte of a running disk, or of a closed image.",
    "metrics": "Print figures of VMs and their disks in Prometheus's text format.",
    "migrate": "Have the guest of a running VM go on in another QEMU, with its disks.",
    "plan": "Show what a policy would do to the disks of running VMs; change nothing.",
    "recover": "Undo, or carry on, what a qmpblock that died left in a VM, or to images.",
    "restore": "Restore disks from backups; no VM is needed.",
    "snapshot": "Freeze the active layers of running disks at one point in time.",
    "stream": "Copy what lower layers hold into a layer of a running disk, and drop them.",
    "verify": "Compare two closed images byte for byte, holes and written zeros alike.",
    "vms": "List the VMs of this host, whoever runs them, and how each can be worked on.",
}
_READERS = frozenset({"disks", "doctor", "jobs", "map", "metrics", "plan", "verify", "vms"})
_WITHOUT_VM = frozenset({"restore", "verify", "backup check", "backup list"})
WARNED = 4
INTERRUPTED = 130
_LONGEST = 10_000  # characters of a line of a message


class _Lazy(click.Group):
    """A group whose commands are modules of this package, imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"qmpblock.cli.{cmd_name}_command")
        loaded: click.Command = module.command
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # without importing any of them
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qmpblock", message="%(prog)s %(version)s")
def _group() -> None:
    """Disks of running QEMU virtual machines: maps, allocation, jobs.

    ADDRESS is a QMP monitor: a UNIX socket path, unix:PATH, HOST:PORT or tcp:HOST:PORT, or, on
    another host, ssh://[USER@]HOST[:PORT]/PATH, or libvirt:DOMAIN, incus:INSTANCE, pve:VMID.
    DISK is a qdev id, QOM path, drive id, node name, the active image's file name, or
    its manager's name of it.

    Exit codes: 0 done, 1 failed, 2 wrong request and nothing touched, 3 no monitor,
    4 done with a warning, 130 interrupted and undone.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("qmpblock: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # A command that was cancelled leaves a late reply, which qemu.qmp reports as an error.
    logging.getLogger("qemu").propagate = False
    try:
        code = _group.main(list(arguments), prog_name="qmpblock", standalone_mode=False)
    except Error as error:
        _complain(str(error))
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        vm = "" if isinstance(error, _WithoutVM) else " in the VM"
        _complain(f"interrupted; nothing of ours is left{vm}")
        return INTERRUPTED
    except Exception as error:
        return _last_resort(error)
    return code if isinstance(code, int) else 0


def delivered(code: int, arguments: Sequence[str], lost: OSError | None) -> int:
    """Return the exit code of a command whose stdout could not be written; say so.

    Of one that only reads, that was all that was asked for. What others have done stands, and is
    no failure. Whoever has closed a pipe has seen enough, and is told nothing.

    :param lost: why it could not; None where it could.
    """
    if lost is None:
        return code
    reads = not arguments or arguments[0] not in _COMMANDS or arguments[0] in _READERS
    closed = isinstance(lost, BrokenPipeError)
    if not closed:
        stands = "" if reads or code not in (0, WARNED) else "\nwhat it was to tell of is done"
        _complain(f"cannot write the output: {lost.strerror or lost}{stands}")
    if reads:
        return code or 1
    return code if closed else code or WARNED


def _last_resort(error: Exception) -> int:
    """Say what nobody expected in one message; a defect of ours, or of a library.

    Where several tasks failed at once, the first error of ours says it.
    """
    known: BaseException = error
    while isinstance(known, ExceptionGroup):
        known = known.exceptions[0]
    if isinstance(known, Error):
        _complain(str(known))
        return known.exit_code
    if os.environ.get("QMPBLOCK_DEBUG"):
        traceback.print_exception(error)
    _complain(
        f"something went wrong that should not: {type(known).__name__}: {printable(known)}\n"
        "what was begun in a VM was undone, as far as that goes; see: qmpblock recover ADDRESS "
        "--dry-run\n"
        "Remedy: run it again with QMPBLOCK_DEBUG=1, and report what it says then"
    )
    return 1


class _WithoutVM(click.Abort):
    """Interrupted, and no VM had a part in it."""


class _OneLine(logging.Formatter):
    """A log record as one line that is safe to show, without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        if not os.environ.get("QMPBLOCK_DEBUG"):
            record.exc_info = record.exc_text = record.stack_info = None
        return "\n  ".join(printable(line, _LONGEST) for line in super().format(record).split("\n"))


def _complain(text: str) -> None:
    first, *rest = (printable(line, _LONGEST) for line in text.split("\n"))
    click.echo(click.style("qmpblock: ", fg="red", bold=True) + first, err=True)
    for line in rest:
        click.echo(f"  {line}", err=True)


@dataclass(frozen=True)
class Options:
    """The options that every command has."""

    json: bool
    stall: float
    nbd: str | None
    tls_creds: str | None
    insecure: bool

    @asynccontextmanager
    async def connect(self, address: str, *, unmanaged: bool = False) -> AsyncIterator[VM]:
        """Connect to a VM with these options.

        A command that disconnects has done what it was to do, and says so, also where it is
        interrupted then; if it goes on to another VM after all, it is interrupted there.

        :param unmanaged: the option of that name (`unmanaged_option`).
        """
        import asyncio

        from qmpblock.vm import connect

        if _late:
            raise asyncio.CancelledError
        async with AsyncExitStack() as stack:
            vm = await stack.enter_async_context(
                connect(
                    address,
                    nbd=self.nbd,
                    tls_creds=self.tls_creds,
                    insecure=self.insecure,
                    unmanaged=unmanaged,
                    stall=self.stall,
                )
            )
            yield vm
            if asyncio.current_task() in _working:  # not one of several at work at once
                with signals_go_to(_late.append):
                    await stack.aclose()


def pair(word: str, what: str) -> tuple[str, str]:
    """Read DISK=FILE; `what` is what such a word is called.

    A disk may be named by a QOM path or file name; a file's name may hold a =.
    """
    disk, equals, file = word.partition("=")
    if not (disk and equals and file):
        raise click.UsageError(f"{word!r} is not {what}")
    return disk, file


class Size(click.ParamType[int]):
    """A number of bytes, with qemu-img's suffixes: K, M, G, T, P, E are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it; click turns the failure into a usage error, exit code 2."""
        if isinstance(value, int):
            return value
        from qmpblock.sizes import LARGEST, parse_size

        size = parse_size(str(value).removeprefix("-"))
        if size is None:
            self.fail(f"{value!r} is not a size such as 65536, 64K or 1.5G", param, ctx)
        if size > LARGEST or str(value).startswith("-"):
            self.fail(f"{value!r} is not between 0 and 2^63 - 1 bytes", param, ctx)
        return size


class Rate(Size):
    """Bytes a second, written like a `Size`; 0 is no limit."""

    name = "rate"


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number of seconds", ctx, param)
    return value


_SHARED = (
    click.option("--json", "json", is_flag=True, help="Print one JSON document on stdout."),
    click.option(
        "--stall",
        type=click.FloatRange(min=0, min_open=True),
        callback=_finite,
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="No progress for so long is a failure.",
    ),
    click.option(
        "--nbd", metavar="ADDRESS", help="A foreign NBD server that already runs in this VM."
    ),
    click.option(
        "--tls-creds",
        metavar="DIR",
        help="TLS credentials for NBD over TCP, laid out as for QEMU's tls-creds-x509.",
    ),
    click.option("--insecure", is_flag=True, help="Allow NBD over TCP without TLS."),
)


#: Of the commands that change chains.
unmanaged_option = click.option(
    "--unmanaged",
    is_flag=True,
    help="Do it also where libvirt or another manager owns the chain, and will not know of it.",
)


def command(
    work: Callable[..., Coroutine[Any, Any, int | None]], *, cls: type[click.Command] | None = None
) -> click.Command:
    """Make a click command of a coroutine function `work(options, **parameters)`.

    What that returns is the exit code; None is 0.

    :param cls: of the command.
    """

    @functools.wraps(work)
    def call(
        json: bool,
        stall: float,
        nbd: str | None,
        tls_creds: str | None,
        insecure: bool,
        **parameters: Any,
    ) -> int | None:
        import asyncio

        options = Options(json, stall, nbd, tls_creds, insecure)
        called = click.get_current_context().info_name
        of_vm = _WITHOUT_VM.isdisjoint({called, f"{called} {parameters.get('address')}"})
        try:
            return asyncio.run(_interruptible(work(options, **parameters), of_vm=of_vm))
        except (asyncio.CancelledError, KeyboardInterrupt):  # by a signal
            raise (click.Abort if of_vm else _WithoutVM) from None

    for option in reversed(_SHARED):
        call = option(call)
    name = work.__name__.removesuffix("_command").strip("_")
    return click.command(name=name, cls=cls or click.Command)(call)


async def _interruptible(
    work: Coroutine[Any, Any, int | None], *, of_vm: bool = True
) -> int | None:
    """Have signals cancel and undo, once: a second one must not break the undoing off.

    :param of_vm: whether it is a VM in which there is something to undo.
    """
    import asyncio

    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def interrupt(number: int) -> None:
        if _takers:
            _takers[-1](number)
        elif not task.cancelling():
            task.cancel()
        else:
            _complain(
                "still undoing what was begun"
                + (
                    "; QEMU has not answered yet. After kill -9, this undoes it: qmpblock recover "
                    "ADDRESS"
                    if of_vm
                    else ""
                )
            )

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Not the main thread: an embedder's business.
        with contextlib.suppress(RuntimeError, ValueError):
            loop.add_signal_handler(number, interrupt, number)
    _late.clear()
    _working.add(task)
    try:
        return await work
    finally:
        _working.remove(task)


_takers: list[Callable[[int], None]] = []
_working: set[asyncio.Task[object]] = set()
_late: list[int] = []  # signals that came as a command disconnected


@contextlib.contextmanager
def signals_go_to(take: Callable[[int], None]) -> Iterator[None]:
    """Have `take` called with each signal that would cancel the command otherwise."""
    _takers.append(take)
    try:
        yield
    finally:
        _takers.remove(take)


def uncut(shown: RenderableType) -> None:
    """Print a table or tree whose lines a terminal may wrap: names in them are there to be copied.

    Left to itself, rich cuts them at the width of the terminal, and at 80 columns in a pipe.
    """
    from rich.console import Console

    Console(highlight=False, soft_wrap=True, width=_LONGEST).print(shown)


def emit(text: str) -> None:
    """Write to stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def warn(warnings: tuple[str, ...]) -> None:
    """Say on stderr what is worth acting on."""
    for warning in warnings:
        click.echo(click.style("warning: ", fg="yellow", bold=True) + warning, err=True)
