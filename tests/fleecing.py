"""Fleecing by plain QMP: a view of a disk as it was, and what reads it."""

import asyncio
from contextlib import asynccontextmanager

from qmpblock.nbd import wire
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import StressSpec

MIB = 1 << 20
DISK = parse_scenario("about: One disk.\nimages: [{format: raw, size: 16M}]\n", "disk")
#: Seconds for which a write may wait for what was there to be kept.
TIMEOUT = 2
#: Of which the view, being of a moment, tells an exact point.
SPEC = StressSpec(blocks=4096, block_size=4096, queue_depth=32, seed=9)
_DRIVE = {"path": "/machine/peripheral/vd0", "property": "drive"}


async def begin_writing(vm, *specs, first=500):
    """Have the guest write to its disks all the time, and wait until it has written so much."""
    specs = specs or (SPEC,)
    for spec in specs:
        await vm.guest.stress(spec)
    for spec in specs:
        async with asyncio.timeout(120):
            while (await vm.guest.progress(spec.disk)).acked < first:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def view(vm, limit=None, stored=None):
    """Put a filter over the disk d0 and a view of that moment over the filter; yields its bounds.

    The node of the view is called so.

    :param limit: bytes that may be kept; None: all that there is.
    :param stored: address of an NBD server where it is, instead of a file.
    """
    kept = vm.directory / "kept"
    if stored is None:
        await _add_kept(vm, kept, limit)
    else:
        await vm.execute("blockdev-add", driver="nbd", node_name="kept", server=stored)
    await vm.execute(
        "blockdev-add",
        driver="copy-before-write",
        node_name="filter",
        file="d0",
        target="kept",
        on_cbw_error="break-snapshot",
        cbw_timeout=TIMEOUT,
    )
    async with vm.guest.bounds(0) as bounds:
        await vm.execute("qom-set", **_DRIVE, value="filter")
    await vm.execute("blockdev-add", driver="snapshot-access", node_name="view", file="filter")
    try:
        yield bounds[0]
    finally:
        if vm.running:
            await vm.execute("blockdev-del", node_name="view")
            await vm.execute("qom-set", **_DRIVE, value="d0")
            for node in ("filter", "kept"):
                await vm.execute("blockdev-del", node_name=node)
        kept.unlink(missing_ok=True)


async def _add_kept(vm, path, limit):
    if limit is None:
        with path.open("wb") as file:
            file.truncate(16 * MIB)
        await _add_file(vm, "kept", path)
        return
    await ran("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    with path.open("r+b") as file:
        file.truncate(limit)
    file = {"driver": "file", "filename": str(path)}
    cage = {"driver": "raw", "offset": 0, "size": limit, "file": file}
    await vm.execute("blockdev-add", driver="qcow2", node_name="kept", file=cage)


@asynccontextmanager
async def server(vm):
    """Run QEMU's NBD server; yields the path of its socket."""
    path = vm.directory / "nbd"
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    try:
        yield path
    finally:
        if vm.running:
            await vm.execute("nbd-server-stop")
        path.unlink(missing_ok=True)


@asynccontextmanager
async def export(vm, path):
    """Export the view; yields its URI."""
    await vm.execute("block-export-add", type="nbd", id="e", node_name="view", name="view")
    try:
        yield f"nbd+unix:///view?socket={path}"
    finally:
        if vm.running:
            await vm.execute("block-export-del", id="e", mode="hard")
            async with asyncio.timeout(120):
                while await vm.execute("query-block-exports"):
                    await asyncio.sleep(0.005)


async def ran(*command):
    """Run a program to its end; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode, out.decode()


async def read_out(copy, uri, program="qemu-img"):
    """Have a client copy an export into a raw file."""
    convert = ("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    code, out = await ran(*convert if program == "qemu-img" else (program, uri, copy))
    assert code == 0, out


async def read_plainly(path, name, offset, length):
    """Read by one request of a client that asks for no structured replies, nor any status."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        await reader.readexactly(18)
        writer.write(wire.encode_client_flags(wire.HandshakeFlag.FIXED_NEWSTYLE))
        writer.write(wire.encode_option(wire.Option.GO, wire.encode_go(name.encode(), [])))
        kind = None
        while kind != wire.OptionReply.ACK:
            head = await reader.readexactly(wire.OPTION_REPLY_SIZE)
            _, kind, size = wire.decode_option_reply(head)
            assert not kind & wire.REPLY_ERROR_BIT
            await reader.readexactly(size)
        simple = wire.HeaderStyle.SIMPLE
        writer.write(wire.encode_request(simple, 0, wire.Command.READ, 1, offset, length))
        reply = wire.decode_simple_reply(await reader.readexactly(wire.SIMPLE_REPLY_SIZE))
        assert reply.error == 0
        return await reader.readexactly(length)
    finally:
        writer.close()
        await writer.wait_closed()


async def copied_by_job(vm, copy, command):
    """Have a job of QEMU's copy the view into a raw file."""
    with copy.open("wb") as file:
        file.truncate(16 * MIB)
    await _add_file(vm, "copy", copy)
    ends = {"device": "view", "target": "copy", "sync": "full"}
    await vm.execute(command, job_id="job", auto_dismiss=False, **ends)
    async with asyncio.timeout(60):
        while True:
            [job] = await vm.execute("query-jobs")
            if job["status"] == "ready":
                await vm.execute("job-complete", id="job")
            if job["status"] == "concluded":
                break
            await asyncio.sleep(0.005)
    assert "error" not in job, job
    await vm.execute("job-dismiss", id="job")
    await vm.execute("blockdev-del", node_name="copy")


async def _add_file(vm, node, path):
    file = {"driver": "file", "filename": str(path)}
    await vm.execute("blockdev-add", driver="raw", node_name=node, file=file)
