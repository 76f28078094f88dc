"""The command as another user runs it: a process with that user's rights, forked for each command.

As a program it reads one JSON list of arguments a line, and answers with one JSON line,
`[exit code, what was printed]`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

VM_USER, STRANGER, GROUP = 64055, 64200, 64100


@dataclass(frozen=True)
class User:
    """Who runs something, as setpriv(1) makes them.

    :ivar uid: and the number of the group of their own.
    :ivar groups: others that they are in.
    :ivar capabilities: that they have, as setpriv names them.
    """

    uid: int
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()

    def command(self, *words):
        """Return the command line that runs a program as this user."""
        groups = ",".join(map(str, self.groups))
        given = ",".join(["-all", *(f"+{one}" for one in self.capabilities)])
        return [
            *("setpriv", f"--reuid={self.uid}", f"--regid={self.uid}"),
            f"--groups={groups}" if groups else "--clear-groups",
            *((f"--inh-caps={given}", f"--ambient-caps={given}") if self.uid else ()),
            *words,
        ]


USERS = {
    "the VM's user": User(VM_USER, (GROUP,)),
    "the images' group": User(STRANGER, (GROUP,)),
    "the group, SYS_PTRACE": User(STRANGER, (GROUP,), ("sys_ptrace",)),
    "the group, SYS_PTRACE, DAC_READ_SEARCH": User(
        STRANGER, (GROUP,), ("sys_ptrace", "dac_read_search")
    ),
    "root": User(0),
}


def python_for_all():
    """Return a Python that every user may run, and the environment in which it finds all.

    This one may be in a directory that only root may enter; then it is the system's.
    """
    if all(one.stat().st_mode & 0o001 for one in Path(sys.executable).resolve().parents):
        return sys.executable, {}
    paths = [one for one in sys.path if one.endswith(("site-packages", "tests"))]
    root = str(Path(__file__).parents[1])
    return "/usr/bin/python3", {"PYTHONPATH": os.pathsep.join([root, *paths])}


@dataclass
class Runner:
    """Runs `qmpblock` as a user, until it is closed."""

    user: User
    environment: dict
    process: subprocess.Popen = field(init=False)

    def __post_init__(self):
        python, found = python_for_all()
        self.process = subprocess.Popen(
            self.user.command(python, "-B", __file__),
            env={**os.environ, **found, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments):
        """Run a command to its end; return its exit code and all that it printed."""
        self.begin(*arguments)
        return self.end()

    def begin(self, *arguments):
        """Begin a command."""
        self.process.stdin.write(json.dumps([str(one) for one in arguments]) + "\n")
        self.process.stdin.flush()

    def end(self):
        """Wait for it."""
        code, printed = json.loads(self.process.stdout.readline())
        return code, printed

    def close(self):
        """End the process, and what it runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _serve():
    import qmpblock.allocation
    import qmpblock.chains.jobs
    import qmpblock.chains.snapshot  # what the commands import, once
    import qmpblock.cli.app

    os.umask(0o007)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as printed:
            pid = os.fork()
            if pid == 0:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = qmpblock.cli.app.run(json.loads(line))
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            printed.seek(0)
            print(json.dumps([code, printed.read()]), flush=True)


if __name__ == "__main__":
    _serve()
