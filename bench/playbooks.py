"""`python -m bench.playbooks`: what the Ansible collection costs a host, beside a bare `true`.

    python -m bench.playbooks [--hosts N] [--forks N] [--rounds N]

Many hosts of an inventory, which are one sshd of this host's, and a VM for each. In turn: `true` by
Ansible's own `command`, `disk_info`, and `disk` in check mode. Connections are kept, and pipelining
is on. For root, or whoever may run an sshd.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import yaml

from bench.live import running, wall
from qmpblock.testing.images import Tools

ROOT = Path(__file__).resolve().parents[1]
PORT = 2299
MIB = 1 << 20
VM = "address={{ address }} executable={{ command }}"
CHECKED = f"{VM} disk={{{{ disk }}}} allocation=full"
#: What is measured: the module, its words, and more for `ansible`.
WAYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "true": ("command", "true", ()),
    "disk_info": ("qmpblock.qmpblock.disk_info", VM, ()),
    "disk, check mode": ("qmpblock.qmpblock.disk", CHECKED, ("--check",)),
}
SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {place}/host
AuthorizedKeysFile {place}/user.pub
PidFile none
UsePAM no
StrictModes no
MaxStartups 100
"""
SSH_CONFIG = """\
Host *
  HostName 127.0.0.1
  HostKeyAlias bench
  Port {port}
  IdentityFile {place}/user
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {place}/known
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  ControlMaster auto
  ControlPersist yes
  ControlPath {place}/s-%n
"""


def sshd(place: Path) -> subprocess.Popen[bytes]:
    """Start an sshd with keys of its own, and write what `ssh` needs to know of it."""
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True
        )
    (place / "known").write_text(f"bench {(place / 'host.pub').read_text()}")
    for name, text in (("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
        (place / name).write_text(text.format(place=place, port=PORT))
    Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program is not None, "there is no sshd (Debian: openssh-server)"
    return subprocess.Popen(
        [program, "-D", "-f", str(place / "sshd_config")], stderr=subprocess.DEVNULL
    )


def prepared(place: Path) -> dict[str, str]:
    """Make the collection and the command to be found; return the environment of Ansible."""
    collection = place / "c" / "ansible_collections" / "qmpblock" / "qmpblock"
    collection.parent.mkdir(parents=True)
    collection.symlink_to(ROOT / "ansible")
    command = place / "qmpblock"
    run = f'exec {sys.executable} -m qmpblock "$@"'
    command.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} PATH=$PATH:/usr/sbin {run}\n")
    command.chmod(0o755)
    return {
        "HOME": str(place),
        "ANSIBLE_HOME": str(place / "a"),
        "ANSIBLE_REMOTE_TEMP": str(place / "r"),
        "ANSIBLE_COLLECTIONS_PATH": str(place / "c"),
        "ANSIBLE_SSH_ARGS": f"-F {place}/ssh_config",
        "ANSIBLE_PIPELINING": "1",
        "LC_ALL": "C.UTF-8",
    }


async def measured(place: Path, hosts: int, forks: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each way, for all hosts together."""
    os.environ.update(prepared(place))
    server = sshd(place)
    try:
        async with AsyncExitStack() as stack:
            told: dict[str, Any] = {}
            for number in range(hosts):
                path = place / f"disk{number}.qcow2"
                create = (Tools.of().img, "create", "-q", "-f", "qcow2", str(path), str(64 * MIB))
                subprocess.run(create, check=True)
                vm = await stack.enter_async_context(running(path, 64 * MIB))
                told[f"hv{number}"] = {
                    "address": vm.monitor_path,
                    "disk": "vd0",
                    "command": str(place / "qmpblock"),
                    "ansible_python_interpreter": sys.executable,
                }
            inventory = place / "hosts.yml"
            inventory.write_text(yaml.safe_dump({"all": {"hosts": told}}))
            ansible = (str(Path(sys.executable).with_name("ansible")), "all", "-i", str(inventory))
            spent: dict[str, list[float]] = {name: [] for name in WAYS}
            for turn in range(rounds + 1):
                for name, (module, words, more) in WAYS.items():
                    line = (*ansible, "-f", str(forks), "-m", module, "-a", words, *more)
                    seconds = await wall(*line)
                    if turn:  # the first one of all connects
                        spent[name].append(seconds)
            return spent
    finally:
        for socket in place.glob("s-*"):
            name = socket.name.removeprefix("s-")
            leave = ("ssh", "-F", str(place / "ssh_config"), "-O", "exit", name)
            subprocess.run(leave, stderr=subprocess.DEVNULL, check=False)
        server.terminate()
        server.wait()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.playbooks", description=__doc__)
    parser.add_argument("--hosts", type=int, default=30)
    parser.add_argument("--forks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qb-") as folder:
        place = Path(folder)
        spent = asyncio.run(measured(place, options.hosts, options.forks, options.rounds))
    base = statistics.median(spent["true"])
    print(
        f"{options.hosts} hosts, {options.forks} at once; seconds, the median of {options.rounds}"
    )
    print(f"{'':18}{'all':>8}{'a host':>10}{'beside true':>14}")
    for name, seconds in spent.items():
        every = statistics.median(seconds)
        beside = (every - base) / options.hosts
        print(f"{name:18}{every:8.2f}{every / options.hosts:10.3f}{beside:14.3f}")


if __name__ == "__main__":
    main()
