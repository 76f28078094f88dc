"""The script that gives up rights before a program runs: what is left of them."""

import ctypes
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headers_of_eve import open_to_all

from qmpblock.errors import ToolError, UnsupportedError
from qmpblock.host import confined
from qmpblock.host.handed import HandedFiles, User

PYTHON = shutil.which("python3", path="/usr/bin:/bin")
ROOT = os.geteuid() == 0
pytestmark = pytest.mark.skipif(PYTHON is None, reason="there is no Python in /usr/bin")
NOBODY = User(54321, 54321)


def has_landlock():
    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


def handed(**options):
    """Return what hands one file: of what is only in memory nothing is given up."""
    files = HandedFiles(**options)
    files.image(leaf(__file__))
    return files


def run(files, code, *arguments):
    """Run Python with these files, and return how it ended."""
    program = str(PYTHON)
    return start(files, files.command(program, ["-I", "-c", code, *map(str, arguments)]))


def start(files, command):
    return subprocess.run(
        command, pass_fds=files.descriptors, capture_output=True, text=True, check=False
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"data")
    return path


def leaf(path):
    return {"driver": "file", "filename": str(path)}


TRY = """
import sys
for path, mode in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        open(path, mode).close()
        print("done")
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_only_what_is_handed_is_opened_and_only_so(file):
    other = file.with_name("other")
    other.write_bytes(b"")
    with HandedFiles() as files:
        name = files.image(leaf(file))["filename"]
        memory = files.memory(b"x")
        done = run(
            files,
            TRY,
            *(name, "rb"),
            *(name, "r+b"),
            *(f"/proc/self/fd/{memory}", "r+b"),
            *(other, "rb"),
            *(other, "r+b"),
            *(file.with_name("new"), "wb"),
            *("/etc/passwd", "rb"),
        )
    denied = "Permission denied"
    assert done.stdout.splitlines() == ["done", denied, "done", denied, denied, denied, denied]
    assert not file.with_name("new").exists()
    with HandedFiles() as files:
        name = files.image(leaf(file), writable=1)["filename"]
        assert run(files, TRY, name, "r+b", name, "wb").stdout.splitlines() == ["done"] * 2
    assert file.read_bytes() == b""


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("script", [False, True])
def test_a_program_in_somebodys_home_comes_to_nothing_else_there(tmp_path, script):
    """Of its installation it comes to itself, its libraries, and QEMU's modules and data."""
    home = tmp_path / "home"
    cat, data = home / "bin" / "cat", home / "share" / "qemu" / "data"
    secret, other = home / ".ssh" / "id", home / "bin" / "other"
    for path in (cat, data, secret, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("read\n")
    if script:
        program = home / "root" / "cat"
        program.parent.mkdir()
        cat.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    else:
        program = cat
    shutil.copy(str(shutil.which("cat")), program)
    cat.chmod(0o755)
    with handed() as files:
        done = start(files, files.command(str(cat), [str(data), str(secret), str(other)]))
    assert done.stdout == "read\n", done.stderr
    assert done.stderr.count("Permission denied") == 2


def test_the_libraries_of_a_program_are_told_by_its_loader():
    program = os.path.realpath(str(shutil.which("cat")))
    loader = confined._loader(Path(program).read_bytes())
    found = confined._libraries(program, loader)
    assert found[0] == loader
    assert any("libc" in Path(one).name for one in found[1:])
    for cut in range(0, 200, 7):
        assert confined._loader(Path(program).read_bytes()[:cut]) in ("", loader[:cut])
    assert confined._libraries(program, "") == []
    assert confined._libraries(program, "/nowhere/ld.so") == []


SOCKETS = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
    try:
        socket.socket(family).close()
        print("done")
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.skipif(os.uname().machine not in confined._NUMBERS, reason="not for this architecture")
def test_there_are_no_sockets():
    with handed() as files:
        assert set(run(files, SOCKETS).stdout.splitlines()) == {"Operation not permitted"}
    with handed(network=True) as files:
        assert "done" in run(files, SOCKETS).stdout


def test_the_script_ends_with_its_parent():
    with handed() as files:
        command = files.command(
            str(PYTHON), ["-c", "import time; print(1, flush=True); time.sleep(60)"]
        )
        command[command.index(str(os.getpid()))] = "os.getpid()"
        code = (
            "import os, subprocess, sys\n"
            "words = [one.replace('os.getpid()', str(os.getpid())) for one in sys.argv[1:]]\n"
            "fds = eval(words.pop(0))\n"
            "child = subprocess.Popen(words, stdout=subprocess.PIPE, pass_fds=fds)\n"
            "assert child.stdout.readline(); print(child.pid, flush=True)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, str(files.descriptors), *command],
            stdout=subprocess.PIPE,
            pass_fds=files.descriptors,
            check=False,
        )
    pid = int(said.stdout)
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.01)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_parent_that_is_gone_is_noticed():
    with handed() as files:
        command = files.command(str(PYTHON), ["-c", ""])
        command[command.index(str(os.getpid()))] = "1"
        done = start(files, command)
    assert done.returncode == confined.FAILED
    assert "gone" in done.stderr


@pytest.mark.skipif(not ROOT, reason="only root can become somebody else")
def test_a_program_that_the_user_may_not_run(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with handed(user=NOBODY) as files:
        done = start(files, files.command(str(program), []))
    assert done.returncode == confined.FAILED
    assert "may not run" in done.stderr


def test_no_program():
    with handed() as files, pytest.raises(ToolError, match="there is no program nowhere"):
        files.command("nowhere", [])


@pytest.mark.skipif(not ROOT, reason="only root can become somebody else")
def test_a_name_that_leads_the_user_elsewhere(file):
    """It was exchanged after we looked; or in a directory into which that user may not."""
    below = {
        "driver": "qcow2",
        "file": leaf(file),
        "backing": {"driver": "raw", "file": leaf(file)},
    }
    with HandedFiles(user=NOBODY) as files:
        files.image(below)
        file.rename(file.with_name("away"))
        file.write_bytes(b"another")
        done = run(files, "")
        assert done.returncode == confined.UNREACHABLE
        with pytest.raises(UnsupportedError, match=f"{file} cannot be opened.*user 54321"):
            files.refuse(done.returncode, done.stderr.encode())


def without_landlock():
    """Have this process, and all it starts, be on a kernel that has no Landlock."""
    load, equal, answer, enosys, allow = 0x20, 0x15, 0x06, 0x50026, 0x7FFF0000
    code = [(load, 0, 0, 0), (equal, 0, 1, 444), (answer, 0, 0, enosys), (answer, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    program = struct.pack("HP", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(one) for one in (1, 0, 0, 0)]
    assert libc.prctl(38, *words) == 0
    assert libc.prctl(22, ctypes.c_ulong(2), program, 0, 0) == 0


@pytest.mark.skipif(not ROOT, reason="root is what matters here")
@pytest.mark.parametrize(
    ("owner", "mode", "driver", "safe"),
    [
        (0, 0o644, "qcow2", True),
        (0, 0o664, "qcow2", False),
        (0, 0o644, "vmdk", False),
        (54321, 0o600, "qcow2", True),
        (54321, 0o600, "vmdk", True),
    ],
)
def test_without_landlock_root_opens_what_only_root_wrote(file, owner, mode, driver, safe):
    file.chmod(mode)
    os.chown(file, owner, owner)
    with HandedFiles() as files:
        files.image({"driver": driver, "file": leaf(file)})
        command = files.command(str(PYTHON), ["-c", "import os; print(os.getuid())"])
        done = subprocess.run(
            command,
            pass_fds=files.descriptors,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=without_landlock,
        )
        assert done.stdout.strip() == (str(owner) if safe else "")
        if not safe:
            assert done.returncode == confined.NOT_SAFE
            with pytest.raises(UnsupportedError, match="no Landlock") as caught:
                files.refuse(done.returncode, done.stderr.encode())
            assert "Linux 5.13" in caught.value.remedy


@pytest.mark.skipif(not ROOT, reason="only root may keep what it gives up here")
def test_root_keeps_the_right_to_files_only_and_only_with_landlock(file):
    code = "print(*[l.split()[1] for l in open('/proc/self/status') if l[:3] == 'Cap'])"
    with HandedFiles() as files:
        files.image(leaf(file))
        assert "Permission denied" in run(files, code).stderr  # nor may it read that
        command = files.command(str(PYTHON), ["-c", code])
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            preexec_fn=without_landlock,
            pass_fds=files.descriptors,
        )
    assert {int(one, 16) for one in done.stdout.split()} == {0}


@pytest.mark.skipif(not ROOT or shutil.which("setpriv") is None, reason="takes root and setpriv")
def test_a_user_who_is_not_root_looks_with_her_own_rights():
    """She has one capability here, to come to the interpreter; it is not handed on."""
    with open_to_all() as directory:
        top, base, secret = (directory / name for name in ("top.qcow2", "base.raw", "secret.raw"))
        for file in (base, secret):
            file.write_bytes(b"x" * 65536)
        make = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*make, "-b", "base.raw", top, "64K"], check=True)
        subprocess.run([*make, "-b", "secret.raw", directory / "bad.qcow2", "64K"], check=True)
        secret.chmod(0o600)
        for file in (top, base, directory / "bad.qcow2"):
            os.chown(file, 54321, 54321)
        reads = "+dac_read_search"
        become = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
        become += [f"--inh-caps={reads}", f"--ambient-caps={reads}"]

        def look(file):
            return subprocess.run(
                [*become, sys.executable, "-m", "qmpblock", "map", "--json", file],
                capture_output=True,
                text=True,
                check=False,
            )

        done = look(top)
        assert (done.returncode, '"depth": 1' in done.stdout) == (0, True), done.stderr
        done = look(directory / "bad.qcow2")
        assert done.returncode == 1
        assert f"'{secret}': Permission denied" in done.stderr


def test_no_core_is_dumped(file):
    code = "import resource, os; print(*resource.getrlimit(resource.RLIMIT_CORE))"
    with handed() as files:
        assert run(files, code).stdout.split() == ["0", "0"]


def test_it_starts_fast():
    """In 16 ms, of which an interpreter alone takes 7."""
    bare = [sys.executable, "-I", "-S", "-c", ""]
    with handed() as files:
        command = files.command("true", [])
        took, alone = [], []
        for _ in range(20):
            began = used()
            assert start(files, command).returncode == 0
            took.append(used() - began)
            began = used()
            subprocess.run(bare, check=True)
            alone.append(used() - began)
    assert min(took) < 4 * min(alone)


def used():
    """Return the seconds that children have worked; how long they waited is the machine's."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_no_file_is_where_a_program_looks_for_a_listening_socket(tmp_path):
    """In a process that has nothing but its standard streams, the next file would be."""
    path = tmp_path / "image"
    path.write_bytes(b"x")
    code = f"""
import os, socket
from qmpblock.host.handed import HandedFiles
os.closerange(3, 100)
with HandedFiles() as files:
    files.image({{"driver": "file", "filename": {str(path)!r}}}, said=True)
    print(*files.descriptors)
    with socket.socket(socket.AF_UNIX) as listening, files.listener(listening):
        print(*files.descriptors)
    print(*files.descriptors)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, both, after = (line.split() for line in done.stdout.splitlines())
    assert (len(alone), len(both), alone) == (1, 2, after)
    assert "3" not in both
