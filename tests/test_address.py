"""Addresses (design.md, contracts)."""

import asyncio
import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.address import (
    IncusAddress,
    LibvirtAddress,
    ProxmoxAddress,
    SSHAddress,
    TCPAddress,
    UnixAddress,
    parse_address,
    parse_monitor,
)
from qmpblock.errors import RequestError
from qmpblock.sockets import open_socket


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("vm.qmp", UnixAddress("vm.qmp")),
        ("unix:vm:4444", UnixAddress("vm:4444")),
        ("unix:/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("/run/odd:4444", UnixAddress("/run/odd:4444")),
        ("host:4444", TCPAddress("host", 4444)),
        ("tcp:host:4444", TCPAddress("host", 4444)),
        ("127.0.0.1:1", TCPAddress("127.0.0.1", 1)),
        ("[::1]:4444", TCPAddress("::1", 4444)),
        ("tcp:[fe80::1%eth0]:4444", TCPAddress("fe80::1%eth0", 4444)),
    ],
)
def test_forms(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "tcp:", "tcp:/run/x", "tcp:host", "host:0", "host:65536", "a\0b", "x" * 108],
)
def test_refused(text):
    with pytest.raises(RequestError) as caught:
        parse_address(text)
    assert caught.value.exit_code == 2
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("address", [UnixAddress("/a/b"), TCPAddress("h", 1), TCPAddress("::1", 2)])
def test_text_form_reads_back(address):
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://h/run/vm.qmp", SSHAddress("h", "/run/vm.qmp")),
        ("ssh://me@h.example:22/q", SSHAddress("h.example", "/q", "me", 22)),
        ("ssh://[fe80::1%eth0]:22/q", SSHAddress("fe80::1%eth0", "/q", None, 22)),
        ("/run/vm.qmp", UnixAddress("/run/vm.qmp")),
        ("ssh:/h/q", UnixAddress("ssh:/h/q")),
        ("libvirt:web", LibvirtAddress("web", "qemu:///system")),
        ("incus:web", IncusAddress("/run/incus/web/qmpblock.qmp")),
        ("incus:dev_web-1", IncusAddress.of("dev_web-1")),
        ("pve:104", ProxmoxAddress("/var/run/qemu-server/104.qmp")),
        ("/run/qemu-server/104.qmp", ProxmoxAddress("/run/qemu-server/104.qmp")),
        ("unix:/x/qemu-server/999999999.qmp", ProxmoxAddress("/x/qemu-server/999999999.qmp")),
        ("/run/qemu-server/104.qga", UnixAddress("/run/qemu-server/104.qga")),
        ("libvirt:4444", LibvirtAddress("4444")),  # never TCP
        ("libvirt:what? now? é", LibvirtAddress("what? now? é")),
        ("libvirt:qemu:///session?a?b", LibvirtAddress("a?b", "qemu:///session")),
        (
            "libvirt:qemu:///system?socket=/run/s?a=b?",
            LibvirtAddress("a=b?", "qemu:///system?socket=/run/s"),
        ),
        ("libvirt:qemu:///session?web:1", LibvirtAddress("web:1", "qemu:///session")),
        (
            "libvirt:qemu+unix:///system?socket=/run/x/libvirt-sock?web",
            LibvirtAddress("web", "qemu+unix:///system?socket=/run/x/libvirt-sock"),
        ),
    ],
)
def test_monitors(text, address):
    assert parse_monitor(text) == address
    assert parse_monitor(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("ssh://", "ssh://h", "ssh:///q", "ssh://h:0/q", "ssh://h:65536/q", "ssh://a@b@h/q"),
        *("ssh://-oProxyCommand=x/q", "ssh://-l@h/q", "ssh://h/a:b", "ssh://h/%h", "ssh://h/$HOME"),
        *("ssh://h/a b", "ssh://h/a\\b", "ssh://h/\n", "ssh://h/" + "x" * 107, "ssh://h/ü"),
    ],
)
def test_what_ssh_would_take_for_something_else_is_refused(text):
    with pytest.raises(RequestError):
        parse_monitor(text)


@pytest.mark.parametrize(
    "text",
    [
        *("libvirt:", "libvirt:qemu:///system", "libvirt:qemu:///system?", "libvirt:a/b"),
        *("libvirt:qemu+ssh://h/system?web", "libvirt:qemu://h/system?web", "libvirt:xen:///?web"),
        *("libvirt:qemu:///embed?root=/x?web", "libvirt:qemu:///system?command=/x?web"),
        *("libvirt:qemu:///system?socket=/x&command=/y?web", "libvirt:?web\0"),
    ],
)
def test_what_is_no_domain_of_this_host_is_refused(text):
    with pytest.raises(RequestError):
        parse_monitor(text)


@pytest.mark.parametrize(
    "text", ["incus:", "incus:a/b", "incus:..", "incus:-web", "incus:a b", "incus:" + "x" * 90]
)
def test_what_is_no_instance_is_refused(text):
    with pytest.raises(RequestError):
        parse_monitor(text)


@pytest.mark.parametrize(
    "text",
    [
        "pve:",
        "pve:web",
        "pve:99",
        "pve:0104",
        "pve:1234567890",
        "pve:104 ",
        "pve:104/x",
        "pve:10\u0664",
    ],
)
def test_what_is_no_number_of_a_vm_is_refused(text):
    with pytest.raises(RequestError) as caught:
        parse_monitor(text)
    assert "qm list" in caught.value.remedy


def test_the_monitor_of_proxmox_on_another_host_is_not_held():
    with pytest.raises(RequestError, match="by turns") as caught:
        parse_monitor("ssh://h/var/run/qemu-server/104.qmp")
    assert "pve:VMID" in caught.value.remedy


def test_a_vm_of_proxmox_is_reached_by_a_socket_of_this_host():
    address = parse_monitor("pve:104")
    assert isinstance(address, UnixAddress)
    assert (address.vmid, str(address)) == ("104", "pve:104")
    assert str(parse_monitor("/x/qemu-server/104.qmp")) == "unix:/x/qemu-server/104.qmp"


def test_an_instance_is_reached_by_a_socket_of_this_host():
    address = parse_monitor("incus:dev_web")
    assert isinstance(address, UnixAddress)
    assert (address.instance, address.path) == ("dev_web", "/run/incus/dev_web/qmpblock.qmp")


def test_the_socket_of_libvirts_daemon():
    assert LibvirtAddress("web").socket is None
    assert LibvirtAddress("web", "qemu+unix:///system?socket=/run/s").socket == "/run/s"


@given(st.text(max_size=150))
def test_any_text_is_an_address_or_a_request_error(text):
    with contextlib.suppress(RequestError):
        parse_address(text)
    with contextlib.suppress(RequestError):
        parse_monitor(f"ssh://{text}")
    with contextlib.suppress(RequestError):
        parsed = parse_monitor(f"libvirt:{text}")
        assert parse_monitor(str(parsed)) == parsed
    with contextlib.suppress(RequestError):
        parsed = parse_monitor(f"incus:{text}")
        assert parse_monitor(str(parsed)) == parsed
    with contextlib.suppress(RequestError):
        parsed = parse_monitor(f"pve:{text}")
        assert parse_monitor(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("vm-host", False),
    ],
)
def test_loopback(host, loopback):
    assert TCPAddress(host, 1).loopback is loopback


async def test_open_socket_reaches_both_kinds(tmp_path):
    path = str(tmp_path / "s")
    server = await asyncio.start_unix_server(lambda r, w: w.close(), path)
    async with server:
        with await open_socket(UnixAddress(path)) as sock:
            assert sock.family == socket.AF_UNIX
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with await open_socket(TCPAddress("127.0.0.1", port)) as sock:
            assert sock.family == socket.AF_INET
    with pytest.raises(OSError, match=r"."):
        await open_socket(UnixAddress(path + "-gone"))
