"""Policies on living QEMUs: wishes, apply twice, failures, several VMs, kills."""

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import replace

import pytest
from allocating import at_command
from applying import (
    DROPPED,
    FULL,
    applied,
    apply_to,
    check_closed,
    one_disk,
    plan_of,
    planned,
    written,
)
from chains import cli
from rounds import with_guest

import qmpblock
from qmpblock.names import lock_names, new_run
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder
from qmpblock.testing.faults import inject, small_file_system
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import Operation, parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")


# -- other wishes


async def chain(scenario, vm_dir, qemu_binary, directory="images"):
    """Build a scenario; return it with its disks' digests."""
    built = await build(scenario, vm_dir / directory, Tools.of(qemu_binary))
    return built, [await disk.active.digest(built.tools) for disk in built.disks]


@CHAIN
async def test_like_the_master_image(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    """As sparse as the base: also when that has left the chain, and its file alone is left."""
    built, [digest] = await chain(scenario, vm_dir, qemu_binary)
    vm = await start_qemu(built)
    # Zeros over data of the base, which is to have host space; and over nothing of it.
    for start in ("1M", "8M"):
        await vm.qemu_io("d0", f"write -z {start} 1M")
    master = str(built.disks[0].active.chain()[-1].path)
    policy = one_disk(vm, "vd0", backing="independent", allocation={"like": master})
    await invariant.begin(vm)
    invariant.expect(DROPPED)
    [plan] = await plan_of(policy)
    assert plan["reserve"] == 1 << 20
    [result] = await apply_to(policy)
    assert (result["state"], result["error"]) == ("done", None)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [layer] = await (await controller.disk("vd0")).layers()
    megabytes = [
        layer.map.clip(number << 20, 1 << 20).where(data=True).total >> 20 for number in range(16)
    ]
    assert megabytes == [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    [again] = await plan_of(policy)
    assert again["steps"] == []
    assert again["today"] == plan["wanted"]
    assert digest  # of another content: the zeros were written since
    for number, byte in enumerate([0, 0, 0xB2, 0xB2, *[0xC4] * 4, *[0] * 8]):
        await vm.qemu_io("d0", f"read -P {byte} {number}M 1M")


FRAGMENTS = 64


async def test_like_a_pattern_of_many_fragments(start_qemu, vm_dir, qemu_binary, invariant):
    """However many they are, one overlay does: each holds the guest for a moment."""
    writes = ", ".join(f"write {2 * n * 64}K 64K 0xaa" for n in range(FRAGMENTS))
    images = f"{{size: 16M, content: [{writes}]}}, {{content: [zero 0 16M]}}"
    text = f"about: A pattern.\nimages: [{images}]\n"
    built = await build(parse_scenario(text, "pattern"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built)
    await invariant.begin(vm)
    traces = []

    @contextlib.asynccontextmanager
    async def connect(address):
        async with qmpblock.connect(address) as controller:
            with at_command(controller.monitor, 0, None) as trace:
                traces.append(trace)
                yield controller

    policy = one_disk(vm, "vd0", allocation={"like": "d0-1"})
    [result] = await apply_to(policy, connect=connect)
    assert (result["state"], result["error"]) == ("done", None)
    assert result["reserved"] == FRAGMENTS * 64 << 10
    assert sum(trace.count("transaction") for trace in traces) == 1
    async with qmpblock.connect(vm.monitor_path) as controller:
        active, below = await (await controller.disk("vd0")).layers()
    assert active.map.where(data=True) == below.map.where(data=True)
    assert (await plan_of(policy))[0]["steps"] == []


@CHAIN
async def test_zeros_stored_as_data_below_get_space_at_once(
    scenario, start_qemu, invariant, vm_dir, qemu_binary
):
    """QEMU brings them up as zeros without space, which no map can foretell."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    base = built.disks[0].active.chain()[-1]
    await base.apply([Operation("write", 12 << 20, 1 << 20, 0)], built.tools)
    vm = await start_qemu(built)
    await invariant.begin(vm)
    invariant.expect(DROPPED)
    policy = one_disk(vm, "vd0", **FULL)
    [result] = await apply_to(policy)
    assert (result["state"], result["error"]) == ("done", None)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [layer] = await (await controller.disk("vd0")).layers()
    assert layer.map.where(data=True).total == layer.map.length
    assert (await plan_of(policy))[0]["steps"] == []


@CHAIN
async def test_a_base_and_a_thin_range(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    built, [digest] = await chain(scenario, vm_dir, qemu_binary)
    vm = await start_qemu(built)
    base = str(built.disks[0].active.chain()[-1].path)
    wanted = {"backing": {"base": base}, "allocation": "thin", "ranges": [{"length": "25%"}]}
    policy = one_disk(vm, "vd0", **wanted)
    await invariant.begin(vm)
    invariant.expect(DROPPED)
    [plan] = await plan_of(policy)
    assert [(step["verb"], step["offset"]) for step in plan["steps"]] == [
        ("allocate", 1 << 20),
        ("drop", 0),
    ]
    [result] = await apply_to(policy)
    assert (result["state"], result["error"]) == ("done", None)
    assert result["dropped"] == [str(built.disks[0].active.backing.path)]
    [again] = await plan_of(policy)
    assert again["today"] == plan["wanted"]
    assert again["steps"] == []
    await invariant.verify(vm)
    await vm.quit()
    active = built.disks[0].active
    short = replace(active, backing=active.backing.backing)
    assert await short.digest(built.tools) == digest


@CHAIN
async def test_node_names_of_layers_that_leave_are_refused(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    policy = one_disk(vm, "vd0", backing="independent", allocation={"like": "d0-2"})
    [plan] = await plan_of(policy)
    assert "name the layer by its file" in plan["error"]
    policy = one_disk(vm, "vd0", backing={"base": "d0"})
    [plan] = await plan_of(policy)
    assert "cannot be its own base" in plan["error"]
    policy = one_disk(vm, "vd0", allocation="full", ranges=[{"offset": "15M", "length": "2M"}])
    [plan] = await plan_of(policy)
    assert "reach to" in plan["error"]


@CHAIN
async def test_a_warning_is_4(scenario, start_qemu, vm_dir):
    """A dirty bitmap counts what is reserved as written."""
    vm = await start_qemu(scenario)
    await vm.execute("block-dirty-bitmap-add", node="d0", name="backup")
    path = written(vm_dir, one_disk(vm, "vd0", allocation="full", ranges=[{"offset": "15M"}]))
    [plan] = await planned(path, code=4)
    assert "dirty bitmap backup" in plan["warnings"][0]
    [result] = await applied(path, code=4)
    assert result["state"] == "done"
    assert "dirty bitmap backup" in result["warnings"][0]
    assert (await planned(path))[0]["steps"] == []
    await vm.execute("block-dirty-bitmap-remove", node="d0", name="backup")


@CHAIN
async def test_pictures_show_what_a_plan_will_change(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    invariant.expect(DROPPED)
    path = written(vm_dir, one_disk(vm, "vd0", **FULL, speed="4M"))
    code, out, err = await cli("plan", path)
    assert (code, err) == (0, "")
    today, wanted = out.split("\nwanted\n")
    assert today.count("\n@") == 3
    assert wanted.count("\n@") == 1
    # Both are drawn to the same scale, under each other.
    assert len({line.index("├") for line in out.splitlines() if "├" in line}) == 1
    assert "3M to copy, 9M to reserve, 3 s at 4M/s" in wanted
    assert "leaving the chain: " in wanted
    code, out, err = await cli("apply", path)
    assert code == 0, err
    assert "3M to copy, 9M to reserve" in err
    assert "1 disk: 1 done" in out
    code, out, _ = await cli("apply", path)
    assert (code, out.splitlines()[-1]) == (0, "1 disk: 1 as they should be")
    code, out, _ = await cli("plan", path)
    assert "nothing to do" in out
    assert "wanted\n" not in out


SMALL = 256 << 20  # bytes of a disk that is made full in a test


async def test_every_scenario_twice(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    """Whatever the format: done, and then nothing is left to do; or refused, and not touched."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, **with_guest(scenario))
    await invariant.begin(vm)
    disks = [
        {"disk": await vm.io.qom_path(disk), **FULL}
        for disk in vm.disks
        if disk.spec.active.size <= SMALL
    ]
    if not disks:
        return
    policy = {"vms": [{"address": vm.monitor_path, "disks": disks}]}
    plans = await plan_of(policy)
    await invariant.verify(vm)
    await invariant.begin(vm)
    results = await apply_to(policy)
    for plan, result in zip(plans, results, strict=True):
        if plan["error"] is None:
            assert (result["error"], result["state"] == "nothing") == (None, not plan["steps"])
        else:
            assert result["error"] == plan["error"]
            assert "nothing was touched" in result["error"]
    for before, again in zip(results, await apply_to(policy), strict=True):
        assert again["state"] == ("failed" if before["state"] == "failed" else "nothing")
    if any(plan["leaving"] and plan["error"] is None for plan in plans):
        invariant.expect(r"^(disappeared|appeared): (node|edge|open file): ")


# -- several disks


@CHAIN
async def test_two_vms_at_once(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    machines = []
    for number in range(2):
        built, [digest] = await chain(scenario, vm_dir, qemu_binary, f"images{number}")
        machines.append((await start_qemu(built), built, digest))
    invariant.expect(DROPPED)
    policy = {
        "parallel": 2,
        "speed": "4M",
        "vms": [
            {
                "address": vm.monitor_path,
                "disks": [{"disk": "vd0", "backing": "independent", "order": number}],
            }
            for number, (vm, _, _) in enumerate(machines)
        ],
    }
    news = []
    results = await apply_to(
        policy,
        progress=lambda wanted, seen: news.append((wanted.address, "at work")),
        ended=lambda result: news.append((result.policy.address, "ended")),
    )
    assert [result["state"] for result in results] == ["done", "done"]
    first = news.index(next(one for one in news if one[1] == "ended"))
    assert len({address for address, _ in news[:first]}) == 2, "one waited for the other"
    for vm, built, digest in machines:
        await invariant.verify(vm)
        await vm.quit()
        await check_closed(built, digest, alone=True)


@CHAIN
async def test_a_terminal_shows_a_bar_for_each_disk(scenario, start_qemu, invariant, vm_dir):
    vms = []
    for _ in range(2):
        vm = await start_qemu(scenario)
        disk = {"disk": "vd0", "allocation": "thin"}
        vms.append({"address": vm.monitor_path, "disks": [disk]})
    path = written(vm_dir, {"parallel": 2, "speed": "2M", "vms": vms})
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "qmpblock", "apply", path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = asyncio.create_task(asyncio.to_thread(until_closed, ours))
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert b"2 disks: 2 done" in out
    screen = await shown
    for vm in vms:
        assert f"vd0 of {vm['address']} " in screen
    assert "%" in screen


def until_closed(terminal):
    """Read what was shown on a terminal until nobody has it open any more."""
    found = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(terminal, 65536):
            found += piece
    os.close(terminal)
    return found.decode()


@pytest.mark.scenarios("two-disks-one-base.yaml")
async def test_one_disk_fails_and_the_others_are_done(
    scenario, start_qemu, invariant, vm_dir, qemu_binary
):
    built, digests = await chain(scenario, vm_dir, qemu_binary)
    left, right = built.disks
    vm = await start_qemu([inject(left, "write_aio", "EIO"), right])
    invariant.expect(r"^(disappeared|appeared): (node|edge|open file): ")
    both = [{"disk": name, "backing": "independent"} for name in ("nosuch", "vleft", "vright")]
    policy = {
        "vms": [
            {"address": str(vm_dir / "no-vm"), "disks": both[:1]},
            {"address": vm.monitor_path, "disks": both},
        ]
    }
    path = written(vm_dir, policy)
    found = await planned(path, code=1)
    assert [one["error"] is None for one in found] == [False, False, True, True]
    results = await applied(path, code=1)
    assert [one["state"] for one in results] == ["failed", "failed", "failed", "done"]
    assert "EIO" in results[2]["error"]
    assert "nothing of ours is left" in results[2]["error"].lower()
    code, out, err = await cli("apply", path)
    assert code == 1
    assert "4 disks: 1 as they should be, 3 failed" in out
    assert "nosuch" in err
    await invariant.verify(vm)
    await vm.quit()
    await check_closed(built, digests[0], alone=False)
    await check_closed(built, digests[1], alone=True, number=1)


@CHAIN
async def test_one_disk_under_two_names_is_told(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    disks = [{"disk": name, "allocation": "thin"} for name in ("vd0", "d0")]
    found = await plan_of({"vms": [{"address": vm.monitor_path, "disks": disks}]})
    assert found[0]["error"] is None
    assert "too" in found[1]["error"]


# -- given up, killed, out of room


async def begun(path):
    """Start `apply` in a process of its own; return it when it is at work."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "qmpblock", "apply", path, "--json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100"},
    )
    async for line in process.stderr:
        if b"allocating, " in line or b"reserving, " in line:
            return process
    raise AssertionError(f"it ended: {await process.wait()}")


@CHAIN
async def test_killed_and_run_again(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    built, [digest] = await chain(scenario, vm_dir, qemu_binary)
    vm = await start_qemu(built)
    invariant.expect(DROPPED)
    slow = written(vm_dir, one_disk(vm, "vd0", **FULL, speed="2M"), "slow.yaml")
    quick = one_disk(vm, "vd0", **FULL)
    for moment in (0.0, 0.9, 2.6):  # while it copies; while it reserves, slice by slice
        process = await begun(slow)
        await asyncio.sleep(moment)
        process.kill()
        await process.wait()
        assert vm.running, vm.evidence()
        await vm.execute("query-status")
    plan = (await plan_of(quick))[0]
    if plan["error"] is not None:  # a plan changes nothing, so it undoes nothing either
        assert "died" in plan["error"]
    [result] = await apply_to(quick)
    assert (result["state"], result["error"]) == ("done", None)
    [plan] = await plan_of(quick)
    assert plan["steps"] == []
    await invariant.verify(vm)
    await vm.quit()
    await check_closed(built, digest, alone=True)


@CHAIN
async def test_whom_a_plan_waits_for(scenario, start_qemu, vm_dir):
    """A plan undoes nothing, not even what the dead left; apply does, and leaves the living."""
    vm = await start_qemu(scenario)
    policy = one_disk(vm, "vd0", allocation="thin")
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        [name] = lock_names([(await controller.disk("vd0")).device])

        async def nothing(holder):
            raise AssertionError(holder)

        me = Holder.me(new_run())
        await lock.acquire(controller.monitor, name, me, nothing, stall=0)
        assert "another controller is at work" in (await plan_of(policy))[0]["error"]
        [result] = await apply_to(policy)
        assert result["state"] == "failed"
        assert await lock.read(controller.monitor, name) == me
        lock.abandon(me.run)
        assert "died" in (await plan_of(policy))[0]["error"]
        assert await lock.read(controller.monitor, name) == me
        [result] = await apply_to(policy)
        assert (result["state"], result["error"]) == ("done", None)
        assert await lock.read(controller.monitor, name) is None


@CHAIN
async def test_interrupted_is_130_and_undone(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    built, [digest] = await chain(scenario, vm_dir, qemu_binary)
    vm = await start_qemu(built)
    path = written(vm_dir, one_disk(vm, "vd0", **FULL, speed="2M"))
    process = await begun(path)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    assert b"nothing of ours is left" in err
    await invariant.verify(vm)
    await vm.quit()
    await check_closed(built, digest, alone=False)


@CHAIN
async def test_host_space_stays_free(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    async with small_file_system(vm_dir / "small", 128 << 20) as small:
        built = await build(scenario, small / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built)
        policy = one_disk(vm, "vd0", **FULL, keep_free="99%")
        [plan] = await plan_of(policy)
        assert "keeps" in plan["error"]
        [result] = await apply_to(policy)
        assert result["state"] == "failed"
        assert "nothing was touched" in result["error"]
        await invariant.verify(vm)

        # Somebody else fills the file system meanwhile.
        await invariant.begin(vm)
        policy = one_disk(vm, "vd0", backing="independent", keep_free="64M", speed="1M")
        other = small / "other"

        def fill(wanted, seen):
            if not other.exists():
                other.write_bytes(bytes(60 << 20))

        [result] = await apply_to(policy, progress=fill)
        assert result["state"] == "failed"
        assert "less than 67108864 bytes free" in result["error"]
        await invariant.verify(vm)
        await vm.quit()


@pytest.mark.scenarios("stress-chain.yaml")
async def test_a_guest_writes_all_the_time(scenario, start_qemu, invariant, vm_dir, qemu_binary):
    """To the very ranges that are allocated: data below, blanks, what a short layer hides."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    spec = StressSpec(
        offset=16 << 20,
        blocks=2048,
        block_size=4096,
        queue_depth=16,
        seed=7,
        flush_every=200,
        read_percent=25,
    )
    await vm.guest.stress(spec)
    stops = vm.control.subscribe("STOP")
    policy = one_disk(vm, "vd0", **FULL)
    [result] = await apply_to(policy)
    assert (result["state"], result["error"]) == ("done", None)
    assert stops.pending() == [], "the guest was paused"
    assert (await plan_of(policy))[0]["steps"] == []
    progress = await vm.guest.progress()
    assert progress.running, progress
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    print(f"the guest's I/O was held for {result['held'] * 1000:.1f} ms at the most")
    invariant.forget(vm)
    await vm.quit()
    raw = vm.directory / "content.raw"
    active = replace(built.disks[0].active, backing=None)
    source = ["-f", active.spec.format, "-O", "raw", str(active.path), str(raw)]
    await built.tools.run(built.tools.img, "convert", *source)
    data = raw.read_bytes()[spec.offset : spec.offset + spec.length]
    verdict = check_acknowledged(data, spec, done.acked, done.issued, background=0)
    assert verdict.ok, verdict
    await active.check(built.tools)
