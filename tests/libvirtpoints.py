"""Whoever is killed in the middle of what libvirt is asked to do: before or after it was asked.

The judge is libvirt: what it starts the domain from the next time has lost nothing, and it and QEMU
have the same chain.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from chains import cli
from libvirtdomain import Domain
from libvirthost import make_chain, run

from qmpblock.host.processes import start_time
from qmpblock.testing.images import Tools

__all__ = ["ACTIVE", "FULL", "HELD", "MIDDLE", "MOVE", "killed", "make_four"]

#: What is begun, in Python: a commit of the active layer of four, and of the next one; host space.
ACTIVE = "async with disk.commit(base='@1'):\n    pass"
MIDDLE = "async with disk.commit(top='@1', base='@2'):\n    pass"
FULL = "await disk.allocate(full=True)"
#: A copy with a pivot, of a disk whose images are in the directory FOLDER.
MOVE = "async with vm.copy({disk: 'FOLDER/copy.qcow2'}, pivot=True):\n    pass"
#: What each of the four holds, by (disk, KiB).
HELD = {(0, 0): 1, (0, 1024): 2, (0, 3072): 3, (0, 4096): 4}

#: A process of ours that does something, and has somebody killed at a call of a `Lender`.
_VICTIM = """
import asyncio, os, signal, sys, qmpblock
address, victim, call, moment = sys.argv[1:]

class Deadly:
    def __init__(self, lender):
        self.lender = lender
    def __getattr__(self, name):
        real = getattr(self.lender, name)
        async def asked(*words, **more):
            if name == call and moment == "before":
                await kill()
            answer = await real(*words, **more)
            if name == call and moment == "after":
                await kill()
            return answer
        return asked

async def kill():
    global call
    call = ""
    runs = (await monitor.execute("query-status"))["running"]
    print("running" if runs else "paused", flush=True)
    if runs:  # a guest writes until the end
        for words in ("write -P {pattern} {where}k 64k", "flush"):
            line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "{{words}}"'
            assert not await monitor.execute(
                "human-monitor-command", {{"command-line": line}}
            )
    os.kill(int(victim) or os.getpid(), signal.SIGKILL)

async def main():
    global monitor
    async with qmpblock.connect(address) as vm:
        monitor = vm.monitor
        disk, real = await vm.disk("vda"), vm.monitor.through
        vm.monitor.through = lambda ask: real(lambda lender: ask(Deadly(lender)))
        {what}
asyncio.run(main())
"""
_INDENT = "\n        "
_WHERE, _LATE = 8192, 99  # KiB where the active layer holds something, and what is written there


def make_four(folder, qemu):
    """Make images one over the other; return the active one."""
    tools = Tools.of(qemu)
    below = make_chain(folder, qemu)
    for number, name in enumerate(("mid", "now"), start=3):
        image = folder / f"{name}.qcow2"
        run(tools.img, "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", image)
        run(tools.io, "-f", "qcow2", "-c", f"write -P {number} {number}M 1M", image)
        below = image
    return below


async def killed(host, chain, qemu, what, victim, call, moment):
    """Have somebody killed in the middle, and see that nothing is lost.

    Returns whether the guest was `running` or `paused` then, and the chain at the end.
    """
    name = f"{chain.parent.name}-{victim}"
    domain = Domain(host, name, qemu, chain)
    domain.written |= HELD
    domain.write(5, _WHERE)
    what = what.replace("FOLDER", str(chain.parent))
    told = await _begin(domain, what, victim, call, moment)
    return told[1], await _judge(domain, victim, told)


async def _begin(domain, what, victim, call, moment):
    """Have a process of ours begin, and somebody killed; return its code, a word, what it said.

    The word is whether the guest was `running` or `paused` in that moment.

    A guest that is not paused in that moment writes to the disk before.

    :param what: lines of Python; in them `disk`.
    :param victim: `controller`, `qemu` or `daemon`.
    :param call: of a `Lender`; `moment`: `before` or `after`.
    """
    code = _VICTIM.format(what=what.replace("\n", _INDENT), pattern=_LATE, where=_WHERE)
    pid = {"controller": 0, "qemu": domain.pid, "daemon": domain.host.daemon}[victim]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, domain.address, str(pid), call, moment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said = asyncio.create_task(process.communicate())
    if victim == "daemon":
        while domain.host.is_running and not said.done():
            await asyncio.sleep(0.01)
        assert not domain.host.is_running, await said
        domain.host.start()
    out, err = await said
    if out == b"running\n":
        domain.written[0, _WHERE] = _LATE
    return process.returncode, out.decode().strip(), err.decode()


async def _judge(domain, victim, told):
    """See that nothing is lost, and that all agree; return the chain as it is then."""
    code, _, err = told
    if victim == "controller":
        assert code == -signal.SIGKILL, err
        code, _, err = await cli("recover", domain.address)
        assert code == 0, err
    elif victim == "qemu":
        assert code == 1, err
        assert "the domain has ended" in err
        domain.ended()
        domain.virsh("start")
    elif "shut off" in domain.virsh("domstate"):
        # libvirt 9.0 cannot read what it wrote of the domain, and has lost it (K41).
        os.kill(domain.pid, signal.SIGKILL)
        while start_time(domain.pid) is not None:
            await asyncio.sleep(0.01)
        domain.ended()
        domain.virsh("start")
    assert "running" in domain.virsh("domstate")
    now, later = domain.chains()
    assert later == now[0]
    assert await domain.layers() == now
    domain.write(9, 12288)
    domain.end()
    return now
