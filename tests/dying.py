"""Controllers that die at a chosen command, forked off one process that has all imported.

As a program (`Graveyard` in killing.py runs it) it reads one JSON request a line and answers
with one JSON line, `{"code": ..., "trace": [...]}`: code 9 of a controller that died, 0 of one
that ended, another of one that failed; the trace is of the commands that it sent. A fork takes
milliseconds where an interpreter takes half a second, and a kill matrix has thousands of points.
"""

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
import traceback

import qmpblock
import qmpblock.allocation.allocate
import qmpblock.backups.run
import qmpblock.chains.jobs
import qmpblock.chains.snapshot
import qmpblock.copying.pointintime
import qmpblock.export.session
import qmpblock.extents.allocationmap
import qmpblock.migration.migrate
import qmpblock.nbd
import qmpblock.policy.file
import qmpblock.policy.run
from qmpblock.copying.copy import copy
from qmpblock.copying.exporting import exported
from qmpblock.copying.fleecing import Fleece

DIED = 9
#: In a trace: that the manager was asked to do something.
ASKED = "ask the manager"


async def run(address, what, connect=qmpblock.connect):
    """Do what a request says to the VM at an address.

    :param connect: makes a VM of the address; a policy is applied over more than one connection.
    """
    if what["do"] == "apply":
        results = await qmpblock.policy.apply(policy_of(address, what), connect=connect)
        for result in results:
            if result.error is not None:
                raise result.error
    else:
        async with connect(address, **_credentials(what, 0)) as vm:
            await perform(vm, what)


def _credentials(what, side):
    """Return how to connect to one of two, where the request has credentials for both."""
    return {"tls_creds": what["credentials"][side]} if "credentials" in what else {}


def policy_of(address, what):
    """Return the policy of a request to apply one: its disks, all of one VM."""
    content = {"vms": [{"address": address, "disks": what["disks"]}]}
    if "speed" in what:
        content["speed"] = what["speed"]
    return qmpblock.policy.file.parse_policy(json.dumps(content))


async def perform(vm, what):
    """Do what a request says to a VM; `what` holds the API's own arguments."""
    arguments = {key: value for key, value in what.items() if key not in ("do", "disk", "overlays")}
    if what["do"] == "recover":
        return await vm.recover(**arguments)
    if what["do"] == "snapshot":
        named = {await vm.disk(disk): file for disk, file in what["overlays"].items()}
        return await vm.snapshot(named, **arguments)
    if what["do"] == "point":
        disks = [await vm.disk(disk) for disk in what["disks"]]
        async with vm.point_in_time(disks, fleece=what.get("fleece")) as points:
            return len(points)
    if what["do"] == "export":
        disks = [await vm.disk(disk) for disk in what["disks"]]
        async with exported(vm, disks, Fleece(), what["words"], stdin=what["stdin"]) as export:
            assert await export.wait() == 0
        return export.result
    if what["do"] == "copy":
        del arguments["targets"]
        named = {await vm.disk(disk): file for disk, file in what["targets"].items()}
        async with copy(vm, named, **arguments) as job:
            pass
        return job.result
    if what["do"] == "backup":
        disks = [await vm.disk(disk) for disk in what["disks"]]
        speed = what.get("speed", 0)
        async with vm.backup(what["directory"], disks, speed=speed) as job:
            pass
        return job.result
    if what["do"] == "migrate":
        del arguments["destination"]
        arguments.pop("credentials", None)
        there = qmpblock.connect(what["destination"], **_credentials(what, 1))
        async with there as other, qmpblock.migrate(vm, other, **arguments) as job:
            pass
        return job.result
    disk = await vm.disk(what["disk"])
    if what["do"] in ("allocate", "layers", "map"):
        return await getattr(disk, what["do"])(**arguments)
    async with getattr(disk, what["do"])(**arguments) as job:
        pass
    return job.outcome


def deadly(monitor, number, moment, die, trace=None):
    """Have a monitor call `die` before or after its command `number`; return the trace.

    What a manager that lends its monitor is asked for counts as one.

    :param monitor: a Monitor, or the class.
    :param number: 0: never.
    :param die: an async function.
    :param trace: of the connections before, which count.
    """
    trace = [] if trace is None else trace

    def counted(real, called):
        async def call(*arguments):
            trace.append(called(*arguments))
            mine = len(trace)
            if mine == number and moment == "before":
                await die()
            try:
                return await real(*arguments)
            finally:
                if mine == number and moment == "after":
                    await die()

        return call

    def command(*arguments):
        name, given = arguments[-2:]
        # Of objects also which: the locks say what had begun, and what had ended.
        return f"{name} {given['id']}" if name.startswith("object-") else name

    monitor._execute = counted(monitor._execute, command)
    monitor.through = counted(monitor.through, lambda *_: ASKED)
    return trace


def _answer(code, trace):
    print(json.dumps({"code": code, "trace": trace, "pid": os.getpid()}), flush=True)


async def _control(request):
    async def die():
        _answer(DIED, trace)
        for pid in request["qemus"]:
            # Dead before this process is: nobody may see it outlive its controller.
            os.kill(pid, signal.SIGKILL)
        os._exit(DIED)

    os.environ |= request["environment"]
    trace = deadly(qmpblock.qemu.monitor.Monitor, request["number"], request["moment"], die)
    connect = functools.partial(qmpblock.connect, nbd=request["nbd"])
    await run(request["address"], request["what"], connect)
    _answer(0, trace)


def _child(request):
    try:
        asyncio.run(_control(request))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main():
    """Serve requests until stdin ends."""
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line))
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, DIED):
                _answer(code, [])


if __name__ == "__main__":
    main()
