"""A key is in no argument, environment, log, journal, message or file; umasks change nothing.

strace shows every program that the command starts, with its words and its environment, and all
that any of them writes or sends. Logs are kept at DEBUG level, of every library.
"""

import asyncio
import base64
import os
import re
import stat
import subprocess
import sys

import pytest

from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

PASSPHRASE = "correct,horse battery staple"
FORMS = [
    PASSPHRASE,
    PASSPHRASE.replace(",", ",,"),
    PASSPHRASE.encode().hex(),
    base64.b64encode(PASSPHRASE.encode()).decode().rstrip("="),
]
ENCRYPTED = f"""
about: An encrypted overlay over a plain image.
images:
  - {{size: 1M, content: [write 0 64K 0xaa]}}
  - {{options: {{encrypt.format: luks}}, secret: "{PASSPHRASE}", content: [write 512K 64K 0xbb]}}
"""
#: The command, with every log kept at DEBUG level, and keys derived in milliseconds.
LOGGING = """
import logging, os, sys
os.umask(int(sys.argv[1], 8))
logging.basicConfig(filename=sys.argv[2], level=logging.DEBUG)
from qmpblock.chains import headers
from qmpblock.cli.app import run
headers._LUKS["encrypt.iter-time"] = 10
for name in ("qemu", "qemu.qmp", "asyncio"):
    logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger(name).addHandler(logging.root.handlers[0])
sys.exit(run(sys.argv[3:]))
"""
STRACE = (
    *("strace", "-f", "-y", "-qq", "-s", "1000000", "-v", "-e", "signal=none", "-e"),
    "trace=execve,execveat,write,writev,pwrite64,pwritev,sendto,sendmsg",
)


def hidden_in(text):
    """Return the forms of the passphrase that a text holds."""
    return [form for form in FORMS if form in text]


async def watched(vm_dir, umask, *arguments):
    """Run a command; return its exit code, what it printed, its log, and the trace of it."""
    log, trace = vm_dir / "log", vm_dir / "trace"
    process = await asyncio.create_subprocess_exec(
        *(*STRACE, "-o", str(trace), sys.executable, "-B", "-c", LOGGING),
        *(oct(umask), str(log), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    found = process.returncode, printed.decode(), log.read_text(), trace.read_text()
    log.unlink()
    trace.unlink()
    return found


@pytest.fixture
def _strace():
    if subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace is not installed, or may not trace here")


@pytest.mark.usefixtures("_strace")
async def test_a_passphrase_is_nowhere_but_in_memory(start_qemu, invariant, vm_dir):
    """Also under umask 0, where all that is ours must have its own mode all the same."""
    vm = await start_qemu(parse_scenario(ENCRYPTED, "encrypted"))
    invariant.forget(vm)
    images = vm.disks[0].active.path.parent
    for arguments in (
        ("map", vm.monitor_path, "vd0"),
        ("snapshot", vm.monitor_path, f"vd0={images}/new.qcow2"),
        ("allocate", vm.monitor_path, "vd0", "--full"),
        # Refused, with a key in hand: there is such a file.
        ("snapshot", vm.monitor_path, f"vd0={images}/new.qcow2"),
    ):
        code, printed, log, trace = await watched(vm_dir, 0, *arguments)
        assert code == (0 if arguments[-1] != "again" else 2) or "exists" in printed, printed
        assert "query-block" in log, "nothing was logged"
        assert not hidden_in(log)
        assert not hidden_in(printed)
        assert "execve(" in trace
        for line in trace.splitlines():
            if hidden_in(line):
                assert re.match(r"\d+ +write\(\d+</memfd:qmpblock>", line), line
        if arguments[0] == "snapshot" and not code:
            assert any(hidden_in(line) for line in trace.splitlines()), "the key was not needed"
    for path in files_of(vm_dir):
        assert not hidden_in(path.read_bytes().decode("latin-1")), path
    for path in (vm_dir / "state").rglob("*"):
        assert not path.stat().st_mode & 0o077, path
    assert stat.S_IMODE((images / "new.qcow2").stat().st_mode) == stat.S_IMODE(
        vm.disks[0].active.path.stat().st_mode
    )


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize("umask", [0, 0o077])
async def test_what_a_change_makes_has_its_mode_whatever_the_umask(
    start_qemu, invariant, vm_dir, umask
):
    """Seen while it lasts: the state directory, what had to be made above it, journals, overlay."""
    plain = ENCRYPTED.replace("options: {encrypt.format: luks}, ", "")
    plain = plain.replace(f'secret: "{PASSPHRASE}", ', "")
    vm = await start_qemu(parse_scenario(plain, "plain"))
    invariant.forget(vm)
    image = vm.disks[0].active.path
    image.chmod(0o640)
    state = vm_dir / "made" / "above" / "state"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-B", "-c", LOGGING, oct(umask), str(vm_dir / "log")),
        *("allocate", vm.monitor_path, "vd0", "--full", "--speed", "64K"),
        env={**os.environ, "QMPBLOCK_STATE": str(state)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(60):
            while not await _lies_on(vm, image):
                await asyncio.sleep(0.01)
        made = [state.parent.parent, state.parent, state, *state.rglob("*")]
        made += image.parent.glob("*.qmpblock-*")
        modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in made if path.exists()}
    finally:
        process.terminate()
        await process.wait()
    assert len(modes) > 5, modes
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != _wanted(path, state)}
    assert wrong == {}


def _wanted(path, state):
    """Return the mode that what we make must have."""
    if path in map(str, (state, *state.parents)):
        return 0o700
    overlay = ".qmpblock-" in path and not path.endswith((".journal", ".elsewhere"))
    return 0o640 if overlay else 0o600


async def _lies_on(vm, image):
    [block] = await vm.execute("query-block")
    return f"{image.name}.qmpblock-" in block["inserted"]["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o666), (0o022, 0o644), (0o077, 0o600)])
async def test_a_picture_follows_the_umask(vm_dir, umask, mode):
    """It is the user's own file, as any that a shell makes."""
    image, picture = vm_dir / "image.raw", vm_dir / "map.svg"
    image.write_bytes(bytes(65536))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-B", "-c", LOGGING, oct(umask), str(vm_dir / "log")),
        *("map", str(image), "--format", "raw", "--svg", str(picture)),
    )
    assert await process.wait() == 0
    assert stat.S_IMODE(picture.stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["no sticky bit", "another's", "a link"])
async def test_a_hostile_temporary_directory(start_qemu, vm_dir, kind, monkeypatch):
    """A map leaves nothing there, and makes nothing there that others could enter."""
    directory = vm_dir / "hostile"
    directory.mkdir()
    if kind == "a link":
        (vm_dir / "to").symlink_to(directory)
        directory = vm_dir / "to"
    else:
        directory.chmod(0o777)
    if kind == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(directory, 65534, 65534)
    monkeypatch.setenv("TMPDIR", str(directory))
    vm = await start_qemu(parse_scenario(ENCRYPTED, "encrypted"))
    trace = vm_dir / "trace"
    process = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-qq", "-e", "signal=none", "-e", "trace=mkdir,mkdirat"),
        *("-o", str(trace), sys.executable, "-B", "-c", LOGGING, "0o0", str(vm_dir / "log")),
        *("map", vm.monitor_path, "vd0", "--json"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    assert list(directory.iterdir()) == []
    made = re.findall(r"mkdir(?:at)?\(.*, (0\d+)\) = 0", trace.read_text())
    assert set(made) <= {"0700"}
