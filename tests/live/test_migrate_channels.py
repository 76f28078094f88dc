"""Memory that goes through several channels: by every way, and what was set is put back."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
from chains import cli
from migrating import arrived, at, both, dies_in, machine, migrated, stays
from nbdservers import HOST, make_credentials_of

import qmpblock
from qmpblock.copying import wire as wire_module
from qmpblock.errors import CommandError
from qmpblock.migration import outward
from qmpblock.migration.passage import Passage

pytestmark = pytest.mark.live

CHANNELS = pytest.mark.needs_qemu(">= 10", reason="older ones can hang with channels (K38)")
MEANS = qmpblock.MigrationMeans(multifd=3)


async def settings(vm):
    """Return what of a VM's migrations is set."""
    listed = await vm.execute("query-migrate-capabilities")
    on = sorted(one["capability"] for one in listed if one["state"])
    return on, (await vm.execute("query-migrate-parameters"))["multifd-channels"]


def sockets(vm):
    """Return the sockets of channels that a VM was told of."""
    told = "".join(line for line in vm.qmp_log() if '"uri"' in line)
    return [Path(one) for one in re.findall(r'unix:([^"]*)', told)]


async def ended(source, destination, result, before):
    """See that the guest is there, and all as it was."""
    assert result.warnings == ()
    assert "3 channels" in result.notices[0].text
    assert await settings(source) == await settings(destination) == before
    await arrived(source, destination, result)


@pytest.fixture
def seen(monkeypatch):
    """Give how many connections there were, as the guest stood."""
    found = []
    enter = Passage.enter

    async def look(self, phase, **how):
        await enter(self, phase, **how)
        if phase.value == "held":
            found.append(len(self.stream._wire._relays))

    monkeypatch.setattr(Passage, "enter", look)
    return found


@CHANNELS
async def test_to_a_destination_here(begin, start_destination, seen):
    source = await begin(machine(2))
    destination = await start_destination(source)
    before = await settings(source)
    result = await migrated(source, destination, means=MEANS)
    assert seen == [4]
    await ended(source, destination, result, before)


@CHANNELS
async def test_to_another_host_by_ssh(ssh_host, begin, start_destination, qemu_binary, seen):
    source = await begin()
    destination = await start_destination(source, qemu=ssh_host.program(qemu_binary))
    before = await settings(source)
    async with (
        qmpblock.connect(source.monitor_path) as one,
        qmpblock.connect(ssh_host.address(destination)) as other,
        qmpblock.migrate(one, other, means=MEANS) as job,
    ):
        pass
    assert seen == [4]
    await ended(source, destination, job.result, before)


@CHANNELS
@pytest.mark.parametrize("phase", ["held", "handed"])
async def test_after_kill_9_all_is_put_back(phase, begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    before = await settings(source)
    source.expect_exit()
    destination.expect_exit()
    await dies_in(phase, source, destination, means={"multifd": 3})
    places = [path.parent for path in (*sockets(source), *sockets(destination))]
    assert [path.exists() for path in places] == [True, True]
    recovered = await qmpblock.recover_migration(source.monitor_path, destination.monitor_path)
    assert recovered.done is (phase == "handed")
    left = destination if recovered.done else source
    assert await settings(left) == before
    assert not any(path.exists() for path in places)
    assert (await left.execute("query-status"))["status"] == "running"


@CHANNELS
async def test_the_command(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    words = ("migrate", source.monitor_path, destination.monitor_path, "--multifd")
    code, _, err = await cli(*words, "65")
    assert code == 2
    assert not any("object-add" in line for line in source.qmp_log())
    code, out, err = await cli(*words, "2", "--dry-run", "--json")
    assert code in (0, 4), err
    [notice] = json.loads(out)["notices"]
    assert "2 channels (multifd)" in notice
    await source.execute(  # neither goes with it on some QEMU
        "migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}]
    )
    code, out, err = await cli(*words, "2", "--json")
    assert code == 0, err
    assert notice in (one["text"] for one in json.loads(out)["notices"])
    assert await settings(source) == (["xbzrle"], 2)
    guest = await destination.attach_guest()
    await guest.stop_stress(0)


@pytest.mark.needs_qemu("< 10", reason="newer ones do not hang with channels (K38)")
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
async def test_where_a_source_could_hang_it_is_refused(words, begin, start_destination, invariant):
    source = await begin()
    await invariant.begin(source)
    destination = await start_destination(source)
    words = (source.monitor_path, destination.monitor_path, "--multifd", "2", *words)
    code, _, err = await cli("migrate", *words)
    assert code == 2
    assert "can hang for ever" in err
    assert "nothing was touched" in err
    await invariant.verify(source)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("compress", marks=pytest.mark.needs_qemu("< 8", reason="it went later")),
        pytest.param("xbzrle", marks=pytest.mark.needs_qemu(">= 10", reason="it went before")),
    ],
)
async def test_what_does_not_go_with_it(name, begin):
    vm = await begin()
    states = [{"capability": one, "state": True} for one in ("multifd", name)]
    with pytest.raises(CommandError, match="not compatible with"):
        await vm.execute("migrate-set-capabilities", capabilities=states)


@CHANNELS
@pytest.mark.soak
@pytest.mark.parametrize("kind", ["x509", "psk"])
async def test_to_another_host_by_tls(
    kind, host, begin, start_destination, qemu_binary, vm_dir, seen
):
    source = await begin()
    destination = await start_destination(source, qemu=host.program(qemu_binary))
    before = await settings(source)
    folder = make_credentials_of(kind, vm_dir / "tls")
    way = f"nbds://{host.there}:10809/?tls-hostname={HOST}"
    async with (
        qmpblock.connect(source.monitor_path, tls_creds=str(folder / "client")) as one,
        qmpblock.connect(destination.monitor_path, tls_creds=str(folder / "server")) as other,
        qmpblock.migrate(one, other, means=MEANS, over=way) as job,
    ):
        pass
    assert seen == [4]
    await ended(source, destination, job.result, before)


@CHANNELS
@pytest.mark.soak
@pytest.mark.parametrize("how", ["dies", "falls silent", "is left"])
@pytest.mark.parametrize("phase", ["active", "held", "sent"])
async def test_the_guest_stays(phase, how, begin, start_destination, invariant, monkeypatch):
    """Whatever waits for one of the connections, all of them are cut."""
    source = await begin()
    before = await settings(source)
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)

    async def breaking():
        if how == "is left":
            raise qmpblock.Error("a test broke it off")
        os.kill(destination.pid, signal.SIGKILL if how == "dies" else signal.SIGSTOP)

    with monkeypatch.context() as patch:
        patch.setattr(outward, "STANDSTILL", 3.0)
        patch.setattr(wire_module, "HOLD", 2.0)
        with at(patch, phase, breaking), pytest.raises(qmpblock.Error) as failed:
            async with (
                both(source, destination, stall=4) as vms,
                qmpblock.migrate(*vms, means=MEANS),
            ):
                pass
    print(failed.value)
    assert "the guest runs at the source" in failed.value.standing
    await stays(source, invariant)
    assert await settings(source) == before
    assert not any(path.parent.exists() for path in sockets(source))
    with contextlib.suppress(ProcessLookupError):
        os.kill(destination.pid, signal.SIGCONT)
    await destination.kill()
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination, means=MEANS))
