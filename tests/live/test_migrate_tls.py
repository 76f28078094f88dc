"""Migrations to another host by TCP with TLS: certificates, keys, and what does not go together."""

import contextlib
import json
import shlex
import shutil

import pki
import pytest
from chains import cli
from disturbed import nothing_of_ours
from jsonschema import Draft202012Validator
from migrating import arrived, at, machine, stays
from nbdservers import HOST, make_credentials_of
from test_docs import ROOT, blocks

import qmpblock
from qmpblock.copying import wire as wire_module
from qmpblock.migration import outward

pytestmark = pytest.mark.live

PAGE = ROOT / "docs/migration.md"
SCHEMA = json.loads((ROOT / "docs/schema/migration-plan.schema.json").read_text())


@pytest.fixture
def credentials(vm_dir):
    """Give what makes folders `client` and `server` of one kind."""

    def make(kind, name="tls"):
        return make_credentials_of(kind, vm_dir / name)

    return make


def over(host, name=HOST):
    return f"nbds://{host.there}:10809/?tls-hostname={name}"


@contextlib.asynccontextmanager
async def both(source, destination, here, there, *, stall=60.0, insecure=False):
    how = {"stall": stall, "insecure": insecure}
    async with (
        qmpblock.connect(source.monitor_path, tls_creds=here, **how) as one,
        qmpblock.connect(destination.monitor_path, tls_creds=there, **how) as other,
    ):
        yield one, other


async def migrated(source, destination, folder, way, *, stall=60.0, **options):
    here, there = str(folder / "client"), str(folder / "server")
    return await migrated_with(source, destination, here, there, way, stall=stall, **options)


async def migrated_with(source, destination, here, there, way, *, stall=60.0, **options):
    async with (
        both(source, destination, here, there, stall=stall) as vms,
        qmpblock.migrate(*vms, over=way, **options) as job,
    ):
        async for _ in job:
            pass
    return job.result


async def settings(vm):
    parameters = await vm.execute("query-migrate-parameters")
    return parameters["tls-creds"], parameters["tls-hostname"]


@pytest.mark.parametrize("kind", ["x509", "psk"])
async def test_two_disks_and_the_memory(kind, host, begin, land, credentials):
    source = await begin(machine(2))
    destination = await land(source)
    result = await migrated(source, destination, credentials(kind), over(host))
    assert await settings(source) == await settings(destination) == ("", "")
    await arrived(source, destination, result)


async def test_the_memory_alone(host, begin, land, credentials):
    source = await begin()
    destination = await land(source, shared=True)
    result = await migrated(source, destination, credentials("x509"), over(host), memory_only=True)
    await arrived(source, destination, result)


async def test_without_tls_only_where_it_is_said(host, begin, land):
    source = await begin()
    destination = await land(source)
    words = ("migrate", source.monitor_path, destination.monitor_path)
    code, _, err = await cli(*words, "--over", f"nbd://{host.there}")
    assert code == 2
    assert "without TLS" in err
    code, _, err = await cli(*words, "--over", f"nbds://{host.there}")
    assert code == 2
    assert "both ends need credentials" in err
    code, out, err = await cli(*words, "--over", f"nbd://{host.there}", "--insecure")
    assert code == 0, err
    assert "the guest runs at the destination" in out


@pytest.mark.parametrize("line", [0, 1])
async def test_the_worked_examples(line, host, begin, land, credentials):
    """The commands of docs/migration.md, as they stand there but for names."""
    source = await begin()
    destination = await land(source)
    folder = credentials("x509")
    place = folder / "both"
    pki.certificate(place, folder / "ca", "server", HOST, f"DNS:{HOST},IP:{host.there}")
    for file in (folder / "client").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    [block] = [block for block in blocks(PAGE) if " --over " in block.body and block.words]
    said = block.body.splitlines()[line]
    for word, meant in (
        ("/run/vm/vm.qmp", source.monitor_path),
        ("ssh://other/run/vm/new.qmp", destination.monitor_path),
        ("10.0.0.2", host.there),
        ("other.example", HOST),
        ("/etc/pki/qemu", str(place)),
    ):
        said = said.replace(word, meant)
    code, out, err = await cli(*shlex.split(said)[1:])
    assert code == 0, err
    assert "the guest runs at the destination" in out


@pytest.mark.soak
async def test_a_dry_run_measures_that_very_way(host, begin, land, credentials, invariant):
    """And leaves nothing, so that it can be gone afterwards; what does not go it says."""
    source = await begin()
    destination = await land(source)
    await invariant.begin(source)
    folder = credentials("psk")
    (folder / "both").mkdir()
    shutil.copy(folder / "client/keys.psk", folder / "both")
    words = ("migrate", source.monitor_path, destination.monitor_path, "--dry-run")
    way = ("--over", over(host), "--tls-creds", str(folder / "both"))
    code, out, err = await cli(*words, *way)
    assert code in (0, 4), err
    [wire] = [line for line in out.splitlines() if line.startswith("wire")]
    assert f"wire by {over(host)}: " in wire
    assert "(measured)" in wire
    code, out, err = await cli(*words, *way, "--json")
    planned = json.loads(out)
    Draft202012Validator(SCHEMA).validate(planned)
    assert planned["over"] == over(host)
    assert planned["wire"]["rate"] > 0
    (folder / "both/keys.psk").write_text("nobody:" + "11" * 32 + "\n")
    code, out, err = await cli(*words, *way)
    assert code == 1
    assert "a migration would fail as this did" in err
    await stays(source, invariant)
    await nothing_of_ours(destination)
    assert await settings(source) == await settings(destination) == ("", "")
    result = await migrated(source, destination, folder, over(host))
    await arrived(source, destination, result)


@pytest.mark.parametrize("wrong", ["name", "keys", "authority", "nothing there"])
async def test_what_does_not_go_together_is_refused_before_anything_is_copied(
    wrong, host, begin, land, credentials, invariant
):
    source = await begin()
    destination = await land(source)
    await invariant.begin(source)
    folder, way = credentials("psk" if wrong == "keys" else "x509"), over(host)
    other = credentials("psk" if wrong == "keys" else "x509", "other")
    here, there = str(folder / "client"), str(folder / "server")
    if wrong == "name":
        way = over(host, "evil.example")
    elif wrong == "keys":
        (folder / "client" / "keys.psk").write_text("qemu:" + "11" * 32 + "\n")
    elif wrong == "authority":
        there = str(other / "server")
    else:
        there = str(folder / "nowhere")
    with pytest.raises(qmpblock.Error) as failed:
        await migrated_with(source, destination, here, there, way)
    said = str(failed.value)
    print(said)
    assert "Remedy" in said
    assert "the guest runs at the source" in said
    assert "the destination waits as before" in said
    await stays(source, invariant)
    await nothing_of_ours(destination)
    assert await settings(source) == await settings(destination) == ("", "")
    if wrong == "keys":
        (folder / "server" / "keys.psk").write_bytes((folder / "client/keys.psk").read_bytes())
    result = await migrated(source, destination, folder, over(host))
    await arrived(source, destination, result)


@pytest.mark.parametrize("phase", ["mirroring", "active", "held", "sent"])
async def test_the_wire_is_cut(phase, host, begin, land, credentials, invariant, monkeypatch):
    """The monitor of the destination is reached by another way."""
    source = await begin(machine(2))
    destination = await land(source)
    destination.expect_exit()
    await invariant.begin(source)
    monkeypatch.setattr(outward, "STANDSTILL", 3.0)
    monkeypatch.setattr(wire_module, "HOLD", 2.0)
    folder = credentials("x509")

    async def cutting():
        host.set_wire(up=False)

    with at(monkeypatch, phase, cutting), pytest.raises(qmpblock.Error) as failed:
        await migrated(source, destination, folder, over(host), stall=4)
    print(failed.value)
    assert "the guest runs at the source" in str(failed.value)
    await stays(source, invariant)
    if destination.running:
        await destination.kill()
    host.set_wire(up=True)
    destination = await land(source)
    await arrived(source, destination, await migrated(source, destination, folder, over(host)))
