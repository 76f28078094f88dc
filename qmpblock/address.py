"""Addresses of monitors and NBD servers. Pure: `qmpblock.sockets` connects to one.

::

    /run/vm.qmp   unix:/run/vm.qmp   ./vm.qmp   vm.qmp     a UNIX socket
    host:4444     tcp:host:4444      [::1]:4444            TCP
    ssh://[user@]host[:port]/run/vm.qmp                    a UNIX socket on another host: monitors
    libvirt:DOMAIN   libvirt:URI?DOMAIN                    what libvirt's daemon lends: monitors
    incus:INSTANCE   incus:PROJECT_INSTANCE                a socket beside Incus's own: monitors
    pve:VMID   /run/qemu-server/VMID.qmp                   Proxmox VE's own, by turns: monitors

Without a prefix, a text with a slash, or without a `:PORT` at its end, is a path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import ClassVar

from qmpblock.errors import RequestError, printable

__all__ = [
    "LONGEST_PATH",
    "Address",
    "IncusAddress",
    "LibvirtAddress",
    "MonitorAddress",
    "ProxmoxAddress",
    "SSHAddress",
    "TCPAddress",
    "UnixAddress",
    "parse_address",
    "parse_monitor",
]

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")
LONGEST_PATH = 107
"""Bytes of a UNIX socket's path: sizeof(sockaddr_un.sun_path) - 1, unix(7)."""

_SSH = "ssh://"
_BY_SSH = re.compile(
    r"(?:(?P<user>\w[\w.-]*)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>\w[\w.-]*))"
    r"(?::(?P<port>\d{1,5}))?(?P<path>/.*)",
    re.ASCII | re.DOTALL,
)
_LIBVIRT = "libvirt:"
_SYSTEM = "qemu:///system"
_INCUS = "incus:"
_INSTANCE = re.compile(r"\w[\w.-]*", re.ASCII)
_PVE = "pve:"
_VMID = re.compile(r"[1-9]\d{2,8}", re.ASCII)
_PVE_SOCKET = re.compile(r".*/qemu-server/([1-9]\d{2,8})\.qmp", re.ASCII | re.DOTALL)
_LOCAL_QEMU = re.compile(r"qemu(?:\+unix)?:///(?:system|session)(?:\?socket=[^?&#]+)?")
_FOR_SSH = re.compile(r"[\w./+=@,~-]+", re.ASCII)  # of a path: what ssh takes as it is


@dataclass(frozen=True)
class UnixAddress:
    """A UNIX socket, by path."""

    path: str
    loopback: ClassVar[bool] = True  # it is of this host

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TCPAddress:
    """A TCP host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        )

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine by its name alone (no look-up is made)."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class SSHAddress:
    """A UNIX socket on another host, to which ssh brings us.

    :ivar host: by a name of the network's, or of ssh's configuration.
    :ivar path: of the socket there.
    :ivar user: None: as ssh's configuration says; likewise `port`.
    """

    host: str
    path: str
    user: str | None = None
    port: int | None = None
    loopback: ClassVar[bool] = False  # it is for another host

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{_SSH}{user}{host}{port}{self.path}"


@dataclass(frozen=True)
class LibvirtAddress:
    """The monitor of a domain, which libvirt's daemon on this host holds, and lends.

    :ivar domain: its name, or its UUID.
    :ivar uri: of the daemon.
    """

    domain: str
    uri: str = _SYSTEM
    loopback: ClassVar[bool] = True  # it is of this host

    def __str__(self) -> str:
        return f"{_LIBVIRT}{self.uri}?{self.domain}"

    @property
    def socket(self) -> str | None:
        """The path of the daemon's socket, where the URI names it."""
        return self.uri.partition("?socket=")[2] or None


@dataclass(frozen=True)
class IncusAddress(UnixAddress):
    """A monitor beside Incus's own, where its confinement lets QEMU make one. See `of`."""

    @classmethod
    def of(cls, instance: str) -> IncusAddress:
        """Return that of an instance, `PROJECT_INSTANCE` where it is not of the default project."""
        return cls(f"/run/incus/{instance}/qmpblock.qmp")

    @property
    def instance(self) -> str:
        """As `of` takes it."""
        return self.path.split("/")[3]

    def __str__(self) -> str:
        return f"{_INCUS}{self.instance}"


@dataclass(frozen=True)
class ProxmoxAddress(UnixAddress):
    """The monitor that Proxmox VE made for itself: had by turns (`qmpblock.qemu.turns`)."""

    @classmethod
    def of(cls, vmid: str) -> ProxmoxAddress:
        """Return that of a VM, by its number."""
        return cls(f"/var/run/qemu-server/{vmid}.qmp")

    @property
    def vmid(self) -> str:
        """The number of the VM."""
        match = _PVE_SOCKET.fullmatch(self.path)
        assert match is not None  # so it became one
        return match[1]

    def __str__(self) -> str:
        named = self == ProxmoxAddress.of(self.vmid)
        return f"{_PVE}{self.vmid}" if named else super().__str__()


Address = UnixAddress | TCPAddress
MonitorAddress = Address | SSHAddress | LibvirtAddress


def parse_address(text: str) -> Address:
    """Read an address.

    :raise RequestError: it is empty, its port is not in 1..65535, or its path is longer
        than a UNIX socket's may be (107 bytes).
    """
    if text.startswith("unix:"):
        return _unix(text, text[len("unix:") :])
    tcp = text.startswith("tcp:")
    match = _HOST_PORT.fullmatch(text[len("tcp:") :] if tcp else text)
    if match:
        port = int(match["port"])
        if not 1 <= port <= 65535:
            raise RequestError(f"the port in the address {printable(text)} is not in 1..65535")
        return TCPAddress(match["v6"] or match["host"], port)
    if tcp:
        raise RequestError(f"the address {printable(text)} is not tcp:HOST:PORT")
    return _unix(text, text)


def parse_monitor(text: str) -> MonitorAddress:
    """Read the address of a monitor: one of `parse_address`, ssh://, libvirt:, incus: or pve:.

    The path of a monitor of Proxmox VE's own is as good as pve:.

    :raise RequestError: as of `parse_address`; or ssh would take it for another one; or libvirt's
        URI is not that of a QEMU driver on this host; or no instance of Incus is called so, no VM
        of Proxmox VE.
    """
    if text.startswith(_PVE):
        return _proxmox(text, text[len(_PVE) :])
    if text.startswith(_INCUS):
        return _incus(text, text[len(_INCUS) :])
    if text.startswith(_LIBVIRT):
        return _libvirt(text, text[len(_LIBVIRT) :])
    if not text.startswith(_SSH):
        address = parse_address(text)
        if isinstance(address, UnixAddress) and _PVE_SOCKET.fullmatch(address.path):
            return ProxmoxAddress(address.path)
        return address
    match = _BY_SSH.fullmatch(text[len(_SSH) :])
    if match is None:
        raise RequestError(
            f"the address {printable(text)} is not ssh://[USER@]HOST[:PORT]/PATH/OF/MONITOR"
        )
    port = None if match["port"] is None else int(match["port"])
    if port is not None and not 1 <= port <= 65535:
        raise RequestError(f"the port in the address {printable(text)} is not in 1..65535")
    path = match["path"]
    if not _FOR_SSH.fullmatch(path):
        raise RequestError(
            f"the path in {printable(text)} has a character that ssh does not take as it is",
            remedy="name the monitor by another path: a symbolic link to its directory",
        )
    if len(path) > LONGEST_PATH:
        raise RequestError(f"the path in {printable(text)} is longer than {LONGEST_PATH} bytes")
    if _PVE_SOCKET.fullmatch(path):
        raise RequestError(
            f"{printable(text)} is a monitor of Proxmox VE's own, which is had by turns, on its "
            "host alone",
            remedy="run qmpblock there, with the address pve:VMID",
        )
    return SSHAddress(match["v6"] or match["host"], path, match["user"], port)


def _libvirt(text: str, rest: str) -> LibvirtAddress:
    uri, domain = _SYSTEM, rest  # a domain's name may have a ? in it, and a URI has one
    if "://" in rest:
        local = _LOCAL_QEMU.match(rest)
        if local is not None and rest[local.end() :].startswith("?"):
            uri, domain = local[0], rest[local.end() + 1 :]
        else:
            uri, _, domain = rest.rpartition("?")
    if not domain or "/" in domain or "\0" in text:
        raise RequestError(
            f"the address {printable(text)!r} is not libvirt:DOMAIN or libvirt:URI?DOMAIN",
            remedy="domains by name: virsh list",
        )
    if not _LOCAL_QEMU.fullmatch(uri):
        raise RequestError(
            f"{printable(uri)!r} is not qemu:///system or qemu:///session, with ?socket=PATH or "
            "without",
            remedy="libvirt lends no file descriptors to another host: run qmpblock on the VM's",
        )
    return LibvirtAddress(domain, uri)


def _incus(text: str, instance: str) -> IncusAddress:
    address = IncusAddress.of(instance)
    if not _INSTANCE.fullmatch(instance) or len(address.path) > LONGEST_PATH:
        raise RequestError(
            f"the address {printable(text)!r} is not incus:INSTANCE or incus:PROJECT_INSTANCE",
            remedy="instances by name: incus list",
        )
    return address


def _proxmox(text: str, vmid: str) -> ProxmoxAddress:
    if not _VMID.fullmatch(vmid):
        raise RequestError(
            f"the address {printable(text)!r} is not pve:VMID",
            remedy="VMs by number: qm list",
        )
    return ProxmoxAddress.of(vmid)


def _unix(text: str, path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise RequestError(f"the address {printable(text)!r} names no socket")
    if len(path.encode()) > LONGEST_PATH:
        raise RequestError(
            f"the socket path in {printable(text)} is longer than {LONGEST_PATH} bytes",
            remedy="use a relative path from a directory nearer to it, or a symbolic link",
        )
    return UnixAddress(path)
