"""New images of a running VM: what qemu-img made, and nobody's query can kill the VM over it."""

import base64
import json
import logging
import secrets
import shutil
import subprocess

import pytest
from asking import QUERIES, Poller
from chains import nothing_left, subjects

import qmpblock
from qmpblock import luks
from qmpblock.address import TCPAddress
from qmpblock.chains import headers, overlay
from qmpblock.chains.headers import Header
from qmpblock.errors import CommandError, ToolError, UnsupportedError
from qmpblock.host.qemuimg import QemuImg
from qmpblock.qemu.keys import read_keys
from qmpblock.testing.images import Tools, build

pytestmark = pytest.mark.live
CHAIN = pytest.mark.scenarios("chain-3.yaml")
MIB = 1 << 20
PATIENCE = 300.0  # seconds; on a busy host a key takes longer than a minute to derive
OVER = ("active.qcow2", "qcow2")

HEADERS = {
    "alone": Header("qcow2", 64 * MIB),
    "overlay": Header("qcow2", 64 * MIB, OVER),
    "smallest-clusters": Header("qcow2", 8 << 30, OVER, 512),
    "largest-clusters": Header("qcow2", 16 << 40, OVER, 2 * MIB),
    "odd": Header("qcow2", 1536, ("./a:b,c=d.raw", "raw")),
    "qed": Header("qed", 64 * MIB, OVER),
    "qed-over-raw": Header("qed", 1 << 40, ("a.raw", "raw")),
    "encrypted": Header("qcow2", 64 * MIB, OVER, key_secret="key"),
}


@pytest.fixture
def endangered(start_qemu, invariant):
    """Say of a controller whether its QEMU is one that a query can kill."""
    return lambda controller: controller.monitor.version < (10, 0, 0)


def store(contents, path):
    with path.open("xb") as file:
        contents.write_to(file.fileno())
    return path


# -- nobody's query kills the VM


@CHAIN
async def test_others_may_ask_while_overlays_are_made(scenario, start_qemu, invariant):
    """K11: QEMU 7.2 died of the first or the second snapshot."""
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # the chain grows
    with Poller(vm.second_monitor_path) as poller:
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            folder = vm.image_directories()[0]
            for number in range(8):
                await disk.snapshot(folder / f"overlay{number}")
            assert len(disk.chain.layers) == 11
    assert poller.count > 20


@CHAIN
async def test_others_may_ask_while_space_is_reserved(scenario, start_qemu):
    """The same of the overlays and zeros of staged commits, and of their jobs and reopenings."""
    vm = await start_qemu(scenario)
    with Poller(vm.second_monitor_path) as poller:
        async with qmpblock.connect(vm.monitor_path) as controller:
            disk = await controller.disk("vd0")
            for number in range(6):
                result = await disk.allocate((10 + number) * MIB, MIB // 2, full=True)
                assert result.reserved > 0
    assert poller.count > 20


@CHAIN
async def test_others_may_ask_while_nodes_are_opened(scenario, start_qemu, vm_dir):
    """What is done instead of a create job: no query comes between, however often it is asked."""
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        made = await headers.make(controller, Header("qcow2", 64 * MIB, OVER))
        path = str(store(made, vm_dir / "image"))
        with Poller(vm.second_monitor_path, QUERIES) as poller:
            for _ in range(100):
                storage = {"driver": "file", "node-name": "t-file", "filename": path}
                options = {"driver": "qcow2", "node-name": "t", "file": "t-file", "backing": None}
                await vm.execute("blockdev-add", **storage)
                await vm.execute("blockdev-add", **options)
                await vm.execute("blockdev-reopen", options=[{**options, "discard": "unmap"}])
                await vm.execute("blockdev-del", **{"node-name": "t"})
                await vm.execute("blockdev-del", **{"node-name": "t-file"})
            assert poller.count > 20
    (vm_dir / "image").unlink()


# -- what is made


@CHAIN
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
async def test_it_is_what_a_create_job_makes(header, scenario, start_qemu, vm_dir, invariant):
    """To the byte, where no key is drawn; whatever the versions of QEMU and qemu-img are."""
    vm = await start_qemu(scenario, extra=["-object", "secret,id=key,data=sesame"])
    invariant.forget(vm)  # the job and its node are the test's
    theirs = vm_dir / "theirs"
    theirs.touch()
    async with qmpblock.connect(vm.monitor_path, stall=PATIENCE) as controller:
        ours = store(await headers.make(controller, header), vm_dir / "ours")
        storage = {"driver": "file", "node-name": "t", "filename": str(theirs)}
        await vm.execute("blockdev-add", **storage)
        await luks.retried(lambda: overlay._run_create(controller, "t", header.job("t")))
    await vm.quit()
    tools = Tools.of()
    seen = []
    for file in (ours, theirs):
        info = json.loads(
            await tools.run(tools.img, "info", "--output=json", "-f", header.format, str(file))
        )
        for place in ("filename", "full-backing-filename", "actual-size", "children"):
            info.pop(place, None)
        encryption = info.get("format-specific", {}).get("data", {}).get("encrypt", {})
        for drawn in ("uuid", "slots", "master-key-iters"):
            encryption.pop(drawn, None)
        seen.append(info)
    assert seen[0] == seen[1]
    assert seen[0]["virtual-size"] == header.size
    if header.key_secret is None:
        assert ours.read_bytes() == theirs.read_bytes()
        assert ours.stat().st_blocks <= theirs.stat().st_blocks


# -- keys


async def add_keys(vm, form, directory):
    """Add the objects of a key in one of its forms; return the texts that nobody may see."""
    add = vm.execute
    if form == "data":
        await add("object-add", qom_type="secret", id="key", data="se,same")
        return ["se,same"]
    if form == "base64":
        text = base64.b64encode("sésame".encode()).decode()
        await add("object-add", qom_type="secret", id="key", data=text, format="base64")
        return [text]
    if form == "file":
        (directory / "key").write_bytes(b"two\nlines of sesame\n")
        await add("object-add", qom_type="secret", id="key", file=str(directory / "key"))
        return ["sesame"]
    assert form == "encrypted"
    # As libvirt does it: the master key in a file, the disk's encrypted with it.
    master, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    (directory / "master").write_text(base64.b64encode(master).decode())
    text = subprocess.run(
        ["openssl", "enc", "-aes-256-cbc", "-K", master.hex(), "-iv", iv.hex(), "-a", "-A"],
        input=b"sesame",
        capture_output=True,
        check=True,
    ).stdout.decode()
    await add(
        "object-add",
        qom_type="secret",
        id="master",
        file=str(directory / "master"),
        format="base64",
    )
    await add(
        "object-add",
        qom_type="secret",
        id="key",
        data=text,
        format="base64",
        keyid="master",
        iv=base64.b64encode(iv).decode(),
    )
    return [text, base64.b64encode(master).decode()]


@CHAIN
@pytest.mark.parametrize("form", ["data", "base64", "file", "encrypted"])
async def test_a_key_is_handed_on_and_never_shown(
    form, scenario, start_qemu, invariant, vm_dir, caplog
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # the objects are the test's
    hidden = await add_keys(vm, form, vm_dir)
    with caplog.at_level(logging.DEBUG):
        async with qmpblock.connect(vm.monitor_path) as controller:
            keys = await read_keys(controller.monitor, "key")
            options = {"key-secret": f"key{len(keys) - 1}", "iter-time": 10}
            made = await QemuImg().create("luks", MIB, options, keys=keys)
            with pytest.raises(ToolError) as caught:
                await QemuImg().create("luks", MIB, {**options, "hash-alg": "none"}, keys=keys)
    assert "qom-get" not in caplog.text
    for text in hidden:
        assert text not in caplog.text + str(caught.value) + repr(keys) + repr(made)
    assert "query-version" in caplog.text or "qmp_capabilities" in caplog.text  # it does log
    path = str(store(made, vm_dir / "image"))
    # That QEMU, with its own object, opens it is the proof.
    file = {"driver": "file", "filename": path}
    luks_node = {"driver": "luks", "node-name": "t", "file": file, "key-secret": "key"}
    await vm.execute("blockdev-add", **luks_node)


@pytest.mark.scenarios("qcow2-luks.yaml")
@pytest.mark.parametrize("case", ["gone", "changed", "no-qemu-img"])
async def test_a_key_that_cannot_be_had(
    case, scenario, start_qemu, invariant, vm_dir, qemu_binary, endangered, monkeypatch
):
    """QEMU makes the overlay by itself, or it is refused: where anybody's query would kill."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built)
    invariant.forget(vm)
    # QEMU goes by the object's id; what it is made of is ours to choose before the snapshot.
    ((name, data),) = built.disks[0].active.secrets().items()
    before = sorted(path.name for path in built.directory.iterdir())
    await vm.execute("object-del", id=name)
    (vm_dir / "key").write_text(data)
    await vm.execute("object-add", qom_type="secret", id=name, file=str(vm_dir / "key"))
    if case == "gone":
        (vm_dir / "key").unlink()
    elif case == "changed":
        (vm_dir / "key").write_text("another")
    else:
        monkeypatch.setenv("PATH", str(vm_dir))
        assert shutil.which("qemu-img") is None
    overlay = built.directory / "overlay"
    async with qmpblock.connect(vm.monitor_path, stall=PATIENCE) as controller:
        disk = await controller.disk("vd0")
        if case == "changed":
            with pytest.raises(CommandError, match="nvalid password") as failed:
                await disk.snapshot(overlay)
            assert "nothing of ours is left" in failed.value.standing
            assert "another key" in failed.value.remedy
        elif endangered(controller):
            with pytest.raises(UnsupportedError, match="aborts if anybody asks") as refused:
                await disk.snapshot(overlay)
            assert "No such file" in str(refused.value) or "no qemu-img" in str(refused.value)
            assert refused.value.standing == "nothing was touched"
            with pytest.raises(UnsupportedError, match="aborts if anybody asks"):
                await disk.allocate(0, disk.size, full=True)
        else:
            await disk.snapshot(overlay)
            assert disk.chain.active.node.encrypted
            before.append("overlay")
    assert sorted(path.name for path in built.directory.iterdir()) == sorted(before)


# -- on another host


@pytest.mark.scenarios("chain-3.yaml", "qcow2-luks.yaml")
async def test_an_overlay_on_another_host(
    scenario, start_qemu, invariant, vm_dir, qemu_binary, free_port
):
    """By a TCP monitor: its file is made there, and its bytes go there by an export of ours."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    (subject,) = (await subjects(built, vm_dir)).values()
    vm = await start_qemu(
        built, guest=True, extra=["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"]
    )
    invariant.forget(vm)
    await subject.attach(vm)
    with Poller(vm.second_monitor_path) as poller:
        async with qmpblock.connect(f"127.0.0.1:{free_port}", stall=PATIENCE) as controller:
            disk = await controller.disk("vd0")
            overlay = built.directory / "overlay"
            await disk.snapshot(overlay)
            subject.add_overlay(overlay, "qcow2")
            await subject.keeps_writing()
        assert poller.count > 5
    await subject.writer.stop()
    await nothing_left(vm, [subject])
    await vm.quit()
    await subject.verify()


@CHAIN
async def test_another_host_needs_tls_or_consent(
    scenario, start_qemu, vm_dir, endangered, free_port
):
    await start_qemu(scenario, extra=["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"])
    async with qmpblock.connect(f"127.0.0.1:{free_port}") as controller:
        disk = await controller.disk("vd0")
        elsewhere = TCPAddress("vm-host.example", 4444)  # the check is by name
        controller.monitor.address = controller.monitor._transport._address = elsewhere
        if endangered(controller):
            with pytest.raises(UnsupportedError, match="on another host") as refused:
                await disk.snapshot(vm_dir / "overlay")
            assert refused.value.standing == "nothing was touched"
            assert "--insecure" in refused.value.remedy
            assert "10.0" in refused.value.remedy
        else:  # its own job makes it, and needs no connection
            assert not await headers.by_qemu_img(controller, None, local=False)
        with pytest.raises(UnsupportedError, match="in the clear"):
            await read_keys(controller.monitor, "key")
    assert not (vm_dir / "overlay").exists()
