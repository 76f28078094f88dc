"""Another host for tests: a network of its own, a wire to it, and an sshd there, by root alone.

What runs there has this host's files and processes, but no way here except that wire. A host that
is to have processes of its own sees no others, as any host does.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from nbdservers import CutOffError, set_wire, until
from unpacked import fetched, have_user, laid_over

from qmpblock.host.processes import die_with_parent

SSHD = "usr/sbin/sshd"
_OWN_MOUNTS = ("unshare", "--mount", "--propagation", "slave")

SSHD_CONFIG = """\
ListenAddress {there}
Port {port}
HostKey {place}/host
AuthorizedKeysFile {place}/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
ForceCommand {place}/session
"""
#: Of an sshd that is laid over /usr: what it runs sees what everybody else here sees, and not that;
#: but its program for files, which lies there alone.
SESSION = """\
#!/bin/sh
case "$SSH_ORIGINAL_COMMAND" in
  */sftp-server*) exec $SSH_ORIGINAL_COMMAND ;;
esac
exec nsenter --mount --target={keeper} --wd="$PWD" -- sh -c "$SSH_ORIGINAL_COMMAND"
"""
SSH_CONFIG = """\
IdentityFile {place}/user
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {place}/known
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
"""
PORT = 2222


class OtherHost:
    """A network of its own. `here` and `there` are the addresses of the wire's two ends.

    :ivar own_processes: whether it has processes of its own, too.
    """

    def __init__(self, number, place, which, own_processes=False):
        network = f"10.{232 + which}.{number}"
        self.here, self.there = f"{network}.1", f"{network}.2"
        self.wire = f"qmpbhost{number}" + (f"-{which}" if which else "")
        self.place = place
        self.own_processes = own_processes
        self.keeper = None
        self.sshd = None

    @property
    def enter(self):
        """What a command is preceded by that is to run there."""
        pid = self.keeper.pid
        # It is the parent of the first process there, so it is not there itself.
        processes = ("--mount", f"--pid=/proc/{pid}/ns/pid_for_children")
        return ("nsenter", f"--target={pid}", "--net", *processes * self.own_processes, "--")

    def address(self, vm):
        """Return that of a VM's monitor there, by ssh."""
        return f"ssh://root@{self.there}:{PORT}{vm.monitor_path}"

    def program(self, path):
        """Return a program that runs another one there."""
        script = self.place / f"there-{Path(path).name}"
        script.write_text(f'#!/bin/sh\nexec {" ".join(self.enter)} {path} "$@"\n')
        script.chmod(0o755)
        return str(script)

    def set_wire(self, *, up):
        set_wire(self.wire, up=up)

    async def serve_ssh(self):
        """Run an sshd there, and have `ssh` here, of the directory returned, know it."""
        starting = await self.having_sshd(f"/{SSHD}", "-D", "-e", "-f", f"{self.place}/sshd_config")
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.place / name))
        host_key = (self.place / "host.pub").read_text()
        (self.place / "known").write_text(f"[{self.there}]:{PORT} {host_key}")
        words = {"there": self.there, "port": PORT, "place": self.place}
        (self.place / "sshd_config").write_text(SSHD_CONFIG.format(**words))
        (self.place / "ssh_config").write_text(SSH_CONFIG.format(**words))
        session = self.place / "session"
        keeper = 1 if self.own_processes else self.keeper.pid  # as it is called there
        session.write_text(SESSION.format(keeper=keeper))
        session.chmod(0o755)
        programs = self.place / "bin"
        programs.mkdir()
        script = programs / "ssh"
        real = shutil.which("ssh")
        script.write_text(f'#!/bin/sh\nexec {real} -F {self.place}/ssh_config "$@"\n')
        script.chmod(0o755)
        with (self.place / "sshd.log").open("wb") as log:
            self.sshd = subprocess.Popen(
                starting,
                stdin=subprocess.DEVNULL,
                stderr=log,
                preexec_fn=die_with_parent(),
            )
        await until(self._listens, "an sshd")
        return programs

    async def having_sshd(self, *command):
        """Return what runs a command there that finds an sshd: it is laid over for it alone."""
        unpacked, why = await asyncio.to_thread(fetched, "sshd", SSHD)
        if unpacked is None:
            raise CutOffError(f"no sshd: {why}")
        Path("/run/sshd").mkdir(exist_ok=True)  # as its package's service does
        lines = [
            laid_over(str(unpacked)),
            have_user("sshd", 64056, str(self.place)),
            'exec "$0" "$@"',
        ]
        # What is mounted later is there, too: it is another host's network alone.
        return [*self.enter, *_OWN_MOUNTS, "sh", "-ec", "\n".join(lines), *command]

    def _listens(self):
        assert self.sshd.poll() is None, (self.place / "sshd.log").read_text()
        probe = subprocess.run(
            ["ssh-keyscan", "-T", "1", "-p", str(PORT), self.there],
            capture_output=True,
            check=False,
        )
        return bool(probe.stdout)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CutOffError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.asynccontextmanager
async def another_host(place, which=0, *, own_processes=False):
    """Make one; `place` is a directory for its keys.

    :param which: of several that one test has.
    :param own_processes: whether what runs elsewhere is not seen there, in a /proc of its own.
    :raise CutOffError: this user may not, or something is missing here.
    """
    if os.geteuid():
        raise CutOffError("only root can make a network of its own")
    place.mkdir(mode=0o700)
    host = OtherHost(os.getpid() % 250, place, which, own_processes)
    options = ("--pid", "--fork", "--kill-child", "--propagation=slave", "--mount-proc")
    host.keeper = subprocess.Popen(
        ["unshare", "--net", *options * own_processes, "sleep", "infinity"],
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),
    )

    def apart():
        if host.keeper.poll() is not None:
            raise CutOffError("unshare --net: not permitted")
        there = Path(f"/proc/{host.keeper.pid}")
        if there.joinpath("ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            return False
        # Of this host the first process is another one.
        return not own_processes or there.joinpath("root/proc/1/comm").read_text() == "sleep\n"

    try:
        await until(apart, "a network of its own")
        peer = ("peer", "name", "wire", "netns", str(host.keeper.pid))
        run("ip", "link", "add", host.wire, "type", "veth", *peer)
        run("ip", "address", "add", f"{host.here}/30", "dev", host.wire)
        run("ip", "link", "set", host.wire, "up")
        run(*host.enter, "ip", "address", "add", f"{host.there}/30", "dev", "wire")
        run(*host.enter, "ip", "link", "set", "wire", "up")
        run(*host.enter, "ip", "link", "set", "lo", "up")
        yield host
    finally:
        for process in (host.sshd, host.keeper):
            if process is not None:
                process.kill()
                await asyncio.to_thread(process.wait)
        # Its network would take the wire with it, but only once all that was sent is given up.
        subprocess.run(["ip", "link", "delete", host.wire], capture_output=True, check=False)


@pytest.fixture
async def host(vm_dir):
    """Give another host."""
    try:
        async with another_host(vm_dir / "host") as made:
            yield made
    except CutOffError as error:
        pytest.skip(str(error))


@pytest.fixture
def land(host, start_destination, qemu_binary):
    """Give what starts a destination on the other host."""

    async def start(source, **options):
        return await start_destination(source, qemu=host.program(qemu_binary), **options)

    return start


@pytest.fixture
async def ssh_host(vm_dir, monkeypatch):
    """Give another host, which `ssh` reaches."""
    try:
        async with another_host(vm_dir / "host") as made:
            programs = await made.serve_ssh()
            monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
            yield made
    except CutOffError as error:
        pytest.skip(str(error))
