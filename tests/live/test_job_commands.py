"""The commands about jobs on a living QEMU, run as programs."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from pathlib import Path

import pytest
from chains import cli
from disturbed import SPEC, Content, build_chain, nothing_of_ours, undisturbed_guest, until, verify
from jsonschema import Draft202012Validator

from qmpblock.testing.images import Tools

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
SLOW = "64K"  # slow enough for several commands to be run meanwhile
OPERATIONS = {
    "stream": ["stream", "vd0"],
    "commit": ["commit", "vd0", "--top", "@1"],
    "pivot": ["commit", "vd0"],
}
OPERATION = pytest.mark.parametrize("operation", OPERATIONS)
LEFT = {"stream": 1, "commit": 2, "pivot": 1}


def valid(text, name):
    value = json.loads(text)
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(value)
    return value


async def start(command, vm, *arguments, second=False):
    address = vm.second_monitor_path if second else vm.monitor_path
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", command, address, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1"},
    )


async def finish(process, code=0):
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return out.decode(), err.decode()


async def run(command, vm, *arguments, code=0, second=False):
    address = vm.second_monitor_path if second else vm.monitor_path
    return await run_program(command, address, *arguments, code=code)


async def run_program(*arguments, code=0):
    done, out, err = await cli(*arguments)
    assert done == code, err
    return out, err


async def start_slowly(vm, operation, *more):
    """Start an operation by command, and wait until its job runs; return both."""
    command, *arguments = OPERATIONS[operation]
    process = await start(command, vm, *arguments, "--speed", SLOW, *more)

    async def running():
        assert process.returncode is None, (await process.communicate())[1]
        jobs = await vm.execute("query-jobs")
        return [job["id"] for job in jobs if job["status"] == "running"]

    [job] = await until(running, "the job")
    return process, job


async def layers(vm):
    out, _ = await run("disks", vm, "--json", second=True)
    return len(valid(out, "disks")[0]["layers"])


def expect_left_writable(invariant, vm, operation):
    """A cancelled active commit leaves the base open for writing: QEMU 7.2's doing."""
    if operation == "pivot" and vm.version < (8,):
        invariant.expect("open file: .*/d0-0.qcow2 for reading", "node: d0-2", "edge: d0-2")


# -- each does its work


@OPERATION
async def test_stream_and_commit(operation, scenario, start_qemu, vm_dir, qemu_binary, invariant):
    tools = Tools.of(qemu_binary)
    built = await build_chain(scenario, vm_dir, qemu_binary)
    content = await Content.of(built, tools)
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    command, *arguments = OPERATIONS[operation]
    out, err = await run(command, vm, *arguments, "--json")
    outcome = valid(out, "chain-job")
    assert outcome["operation"] == command
    assert outcome["changed"] is True
    assert outcome["pivoted"] is (operation == "pivot")
    assert len(outcome["left"]) == 3 - LEFT[operation]
    assert outcome["warnings"] == []
    assert re.search(rf"^{command} of vd0: ended$", err, re.MULTILINE), err
    assert await layers(vm) == LEFT[operation]
    out, _ = await run(command, vm, "vd0", "--json", code=0)
    again = valid(out, "chain-job")
    assert again["changed"] is (operation == "commit")
    await nothing_of_ours(vm)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    layer = 0 if operation == "stream" else 2
    await verify(vm, tools, content, done, layer=layer)


@OPERATION
async def test_what_they_say_to_people(operation, scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    command, *arguments = OPERATIONS[operation]
    out, err = await run(command, vm, *arguments)
    assert re.match(rf"{command} of vd0: done in \d+\.\d s\n", out), out
    assert out.count("no longer in the chain") == 3 - LEFT[operation]
    assert ("start the VM from it" in out) is (operation == "pivot")
    assert ("is stale from now on" in out) is (operation == "pivot")
    assert "\x1b" not in out + err
    assert all(line.startswith(f"{command} of vd0: ") for line in err.splitlines())
    out, err = await run("stream", vm, "vd0")
    if operation != "commit":
        assert "nothing to do" in out
        assert err == ""
    invariant.forget(vm)


@pytest.mark.scenarios("two-disks-one-base.yaml")
async def test_snapshot(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    out, _ = await run("disks", vm, "--json")
    names = [disk["device"] for disk in json.loads(out)]
    directory = vm.image_directories()[0]
    pairs = [f"{name}={directory / f'{name}.over=lay'}" for name in names]
    out, err = await run("snapshot", vm, *pairs, "--json")
    assert err == ""
    made = valid(out, "snapshot")["overlays"]
    assert [one["disk"] for one in made] == names
    assert all(Path(one["file"]).exists() for one in made)
    assert all(not one["backing_name"].startswith("/") for one in made)
    _, err = await run("snapshot", vm, *pairs, code=2)
    assert "exists already" in err
    second = directory / "second.qcow2"
    out, _ = await run("snapshot", vm, f"{names[0]}={second}", "--backing-name", "absolute")
    assert f"the active layer is now {second}" in out
    assert "is frozen" in out
    await nothing_of_ours(vm)
    invariant.forget(vm)


async def test_snapshot_with_a_warning_is_4(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    await vm.execute("block-dirty-bitmap-add", node="d0", name="b", persistent=True)
    overlay = vm.image_directories()[0] / "overlay.qed"
    out, err = await run("snapshot", vm, f"vd0={overlay}", "--format", "qed", "--json", code=4)
    [warning] = valid(out, "snapshot")["warnings"]
    assert warning in err
    invariant.forget(vm)


# -- wrong requests, dead monitors


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("stream", ["nosuch"]),
        ("stream", ["vd0", "--top", "@1", "--base", "@0"]),
        ("stream", ["vd0", "--base", "@7"]),
        ("stream", ["vd0", "--speed", "fast"]),
        ("commit", ["vd0", "--top", "@2", "--base", "@1"]),
        ("commit", ["vd0", "--throttle-guest", "-1"]),
        ("snapshot", ["vd0"]),
        ("snapshot", ["vd0=/no/such/directory/x.qcow2"]),
        ("snapshot", ["vd0=/tmp/x.vdi", "--format", "vdi"]),
        ("snapshot", ["vd0=/tmp/x.qcow2", "vd0=/tmp/y.qcow2"]),
        ("job", ["nosuch", "pause"]),
        ("job", ["nosuch", "speed"]),
        ("job", ["nosuch", "explode"]),
        ("recover", ["--undo", "--continue"]),
        ("jobs", ["--stall", "0"]),
    ],
)
async def test_a_wrong_request_is_2_and_touches_nothing(command, arguments, scenario, start_qemu):
    vm = await start_qemu(scenario)
    out, err = await run(command, vm, *arguments, code=2)
    assert out == ""
    assert err
    assert "Traceback" not in err
    await nothing_of_ours(vm)


@pytest.mark.parametrize(
    "command",
    [["jobs"], ["job", "x", "pause"], ["stream", "d"], ["commit", "d"], ["snapshot", "d=/tmp/o"]],
    ids=lambda command: command[0],
)
async def test_no_monitor_is_3(command, scenario, vm_dir):
    name, *arguments = command
    _, err = await run_program(name, str(vm_dir / "none"), *arguments, code=3)
    assert "cannot connect" in err


async def test_a_failed_job_is_1(scenario, start_qemu):
    vm = await start_qemu(scenario)
    process, job = await start_slowly(vm, "stream")
    await vm.execute("job-cancel", id=job)
    out, err = await finish(process, 1)
    assert out == ""
    assert "anceled" in err
    assert "the chain is as it was; nothing of ours is left in the VM" in err
    await nothing_of_ours(vm)


# -- interrupted


@OPERATION
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_it_undoes_and_is_130(
    number, operation, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    tools = Tools.of(qemu_binary)
    built = await build_chain(scenario, vm_dir, qemu_binary)
    content = await Content.of(built, tools)
    vm = await start_qemu(built, guest=True)
    expect_left_writable(invariant, vm, operation)
    await vm.guest.stress(SPEC)
    process, _ = await start_slowly(vm, operation, "--json")
    process.send_signal(number)
    out, err = await finish(process, 130)
    assert out == ""
    assert "interrupted; nothing of ours is left in the VM" in err
    assert await layers(vm) == 3
    await nothing_of_ours(vm)
    done = await undisturbed_guest(vm)
    await invariant.verify(vm)
    await verify(vm, tools, content, done)


# -- steered from a second monitor


@OPERATION
async def test_steering_by_a_second_monitor(operation, scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    process, job = await start_slowly(vm, operation, "--json")

    async def steer(*arguments, code=0):
        out, err = await run("job", vm, job, *arguments, code=code, second=True)
        return (out, err)

    out, _ = await run("jobs", vm, "--json", second=True)
    [listed] = valid(out, "jobs")
    assert (listed["id"], listed["ours"], listed["disks"]) == (job, True, ["vd0"])
    out, _ = await run("jobs", vm, second=True)
    assert "ours" in out
    out, _ = await steer("pause", "--json")
    assert valid(out, "job") == {"job": job, "verb": "pause", "speed": None, "did": f"pause: {job}"}
    [info] = await vm.execute("query-jobs")
    assert info["status"] == "paused"
    _, err = await steer("dismiss", code=2)
    assert "nothing was touched" in err
    await steer("complete", code=2)  # it is not ready
    out, _ = await steer("speed", "1M", "--json")
    assert valid(out, "job")["speed"] == 1 << 20
    assert (await vm.execute("query-block-jobs"))[0]["speed"] == 1 << 20
    out, _ = await steer("speed", "0")
    assert "no limit" in out
    await steer("resume")
    out, _ = await finish(process)
    assert valid(out, "chain-job")["changed"] is True
    out, _ = await run("jobs", vm, "--json", second=True)
    assert valid(out, "jobs") == []
    out, _ = await run("jobs", vm, second=True)
    assert out == "This VM has no jobs.\n"
    invariant.forget(vm)


async def test_cancelled_by_a_second_monitor(scenario, start_qemu):
    vm = await start_qemu(scenario)
    process, job = await start_slowly(vm, "commit")
    await run("job", vm, job, "cancel", second=True)
    _, err = await finish(process, 1)
    assert "nothing of ours is left" in err
    assert await layers(vm) == 3
    await nothing_of_ours(vm)


async def test_a_second_controller_is_told_who_holds_the_disk(scenario, start_qemu):
    vm = await start_qemu(scenario)
    process, _ = await start_slowly(vm, "stream")
    _, err = await run("commit", vm, "vd0", code=1, second=True)
    assert f"process {process.pid} on " in err
    assert "qmpblock recover" in err
    process.send_signal(signal.SIGINT)
    await finish(process, 130)


async def test_foreign_jobs_are_shown_and_never_touched(scenario, start_qemu):
    vm = await start_qemu(scenario)
    await vm.execute(
        "blockdev-add", driver="null-co", node_name="t", size=16 << 20, read_zeroes=True
    )
    await vm.execute(
        "blockdev-backup", job_id="theirs", device="d0", target="t", sync="full", speed=1
    )

    async def state():
        [job] = await vm.execute("query-block-jobs")
        return {key: job[key] for key in ("device", "status", "paused", "speed", "type")}

    before = await state()
    out, _ = await run("jobs", vm, "--json")
    [listed] = valid(out, "jobs")
    assert (listed["id"], listed["ours"]) == ("theirs", False)
    out, _ = await run("jobs", vm)
    assert "foreign" in out
    for verb in (["pause"], ["cancel"], ["speed", "1M"], ["finalize"], ["dismiss"], ["complete"]):
        _, err = await run("job", vm, "theirs", *verb, code=2)
        assert "is not one of ours" in err
        assert "nothing was touched" in err
    _, err = await run("stream", vm, "vd0", code=1)
    assert "theirs" in err
    out, _ = await run("recover", vm, "--json")
    assert valid(out, "recover") == []
    assert await state() == before
    await vm.execute("block-job-cancel", device="theirs", force=True)

    async def gone():
        return not await vm.execute("query-jobs")

    await until(gone, "the end of the foreign job")
    await vm.execute("blockdev-del", node_name="t")


# -- after kill -9


@pytest.mark.parametrize("verb", ["undo", "continue", "cancel", "dismiss"])
@OPERATION
async def test_after_a_kill_the_job_is_brought_to_an_end(
    verb, operation, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    tools = Tools.of(qemu_binary)
    built = await build_chain(scenario, vm_dir, qemu_binary)
    content = await Content.of(built, tools)
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    process, job = await start_slowly(vm, operation)
    process.kill()
    await process.wait()
    out, _ = await run("recover", vm, "--check", "--json", code=4)
    [planned] = valid(out, "recover")
    assert [step["verb"] for step in planned["steps"]] == ["cancel", "remove"]
    out, _ = await run("recover", vm, "--dry-run")
    assert "would cancel" in out
    assert [one["id"] for one in await vm.execute("query-jobs")] == [job]
    if verb == "continue":
        await run("job", vm, job, "speed", "0")
        out, _ = await run("recover", vm, "--continue", "--json")
        assert valid(out, "recover")[0]["done"] is True
    elif verb in ("cancel", "dismiss"):
        # Cancelled and concluded, its controller dead: nobody dismisses it but us.
        await run("job", vm, job, "cancel")
        if verb == "dismiss":
            await until_concluded(vm, job)
            await run("job", vm, job, "dismiss", code=0 if await there(vm, job) else 2)
        await run("recover", vm)
    else:
        out, _ = await run("recover", vm, "--undo", "--json")
        assert valid(out, "recover")[0]["done"] is False
    await run("recover", vm, "--check")
    await nothing_of_ours(vm)
    assert await layers(vm) == (LEFT[operation] if verb == "continue" else 3)
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    layer = 2 if (verb, operation) == ("continue", "pivot") else 0
    await verify(vm, tools, content, done, layer=layer)


async def there(vm, job):
    return job in [one["id"] for one in await vm.execute("query-jobs")]


async def until_concluded(vm, job):
    async def concluded():
        jobs = {one["id"]: one["status"] for one in await vm.execute("query-jobs")}
        return jobs.get(job, "concluded") == "concluded"

    await until(concluded, "the end of the cancelled job")


# `qmpblock commit`, killed when its pivot is pending: the guest's I/O is held then.
KILLED_IN_PENDING = """
import os, sys
import qmpblock.changes.finalize
async def die(*arguments):
    os._exit(9)
qmpblock.changes.finalize.pivot = die
from qmpblock.cli.app import run
sys.exit(run(["commit", sys.argv[1], "vd0"]))
"""


@pytest.mark.parametrize("how", ["finalize", "recover", "commit"])
async def test_a_guest_that_is_held_by_the_dead_is_freed(
    how, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    tools = Tools.of(qemu_binary)
    built = await build_chain(scenario, vm_dir, qemu_binary)
    content = await Content.of(built, tools)
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED_IN_PENDING, vm.monitor_path),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 9, err
    [job] = await vm.execute("query-jobs")
    assert job["status"] == "pending"
    if how == "finalize":
        out, _ = await run("job", vm, job["id"], "finalize")
        assert "had died" in out
    elif how == "recover":
        out, err = await run("recover", vm, "--json")
        assert valid(out, "recover")[0]["done"] is True
    else:
        out, _ = await run("commit", vm, "vd0")
        assert "nothing to do" in out
    await nothing_of_ours(vm)
    assert await layers(vm) == 1
    held = (await vm.guest.progress()).acked

    async def goes_on():
        return (await vm.guest.progress()).acked > held

    await until(goes_on, "a write after it was freed")
    invariant.forget(vm)
    done = await undisturbed_guest(vm)
    await verify(vm, tools, content, done, layer=2)


@OPERATION
async def test_recover_images_after_qemu_and_controller_died(
    operation, scenario, start_qemu, vm_dir, qemu_binary
):
    built = await build_chain(scenario, vm_dir, qemu_binary)
    vm = await start_qemu(built)
    process, _ = await start_slowly(vm, operation)
    active = str(built.disks[0].active.path)
    _, err = await run_program("recover", active, code=1)
    assert "the VM still runs" in err
    process.kill()
    await process.wait()
    await vm.kill()
    out, _ = await run_program("recover", active, "--check", "--json", code=4)
    [verdict] = valid(out, "recover-images")
    assert verdict["start"] == [active]
    assert verdict["stale"] == []
    out, _ = await run_program("recover", active, "--dry-run")
    assert f"start the VM from {active}" in out
    out, _ = await run_program("recover", active, "--json")
    assert valid(out, "recover-images") == [verdict]
    out, _ = await run_program("recover", active, "--check", "--json")
    assert valid(out, "recover-images") == []
    out, _ = await run_program("recover", active)
    assert out.startswith("safe: ")


# -- progress


async def test_plain_lines_off_a_terminal(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    process, job = await start_slowly(vm, "commit")
    await run("job", vm, job, "pause", second=True)
    await asyncio.sleep(0.6)
    await run("job", vm, job, "resume", second=True)
    await run("job", vm, job, "speed", "0", second=True)
    _, err = await finish(process)
    lines = err.splitlines()
    assert re.fullmatch(r"commit of vd0: copying, \S+ of \S+.*", lines[0]), err
    assert any(line.startswith("commit of vd0: paused") for line in lines), err
    assert lines[-1] == "commit of vd0: ended"
    assert "\x1b" not in err
    invariant.forget(vm)


async def test_a_bar_on_a_terminal(scenario, start_qemu, invariant):
    """Rich draws one, with rate and ETA; it is gone when the command ends."""
    vm = await start_qemu(scenario)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 110, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", "stream", vm.monitor_path, "vd0", "--speed", SLOW),
        stdout=asyncio.subprocess.PIPE,
        stderr=follower,
        stdin=follower,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )
    os.close(follower)
    seen = bytearray()

    def read():
        try:
            seen.extend(os.read(leader, 65536))
        except OSError:  # the program has ended
            asyncio.get_running_loop().remove_reader(leader)

    asyncio.get_running_loop().add_reader(leader, read)
    try:
        await until(lambda: b"to go" in seen, "an ETA")
        [job] = await vm.execute("query-jobs")
        await run("job", vm, job["id"], "speed", "0", second=True)
        out, _ = await process.communicate()
    finally:
        asyncio.get_running_loop().remove_reader(leader)
        os.close(leader)
    assert process.returncode == 0
    text = seen.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "━" in plain
    assert re.search(r"stream of vd0 ━+.* +\d+% .*/16M +copying, [\d.]+[KM]?/s, \d+ s to go", plain)
    assert out.decode().startswith("stream of vd0: done")
    assert text.rstrip().endswith(("\x1b[?25h", "\x1b[2K"))  # the cursor is back, the bar gone
    invariant.forget(vm)
