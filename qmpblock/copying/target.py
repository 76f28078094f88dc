"""Target of a copy: the word that names it, and the options of the nodes that open it. Pure.

::

    PATH                                  a file, or a block device; ./PATH where it looks else
    nbd://HOST[:PORT]/EXPORT              an NBD server
    nbds://HOST[:PORT]/EXPORT             the same with TLS
    nbd+unix:///EXPORT?socket=PATH        at a UNIX socket; nbds+unix with TLS
    ...?tls-hostname=NAME                 whom the certificate of a server with TLS must name

The URIs are those of the NBD project (nbd/doc/uri.md). What it has and this has not (vsock, users,
credentials in the URI) is refused by name, like all else: a word that was left out, of a
security, say, is not noticed until it is too late.

Formats are given by whoever asks for the copy, and never probed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NoReturn
from urllib.parse import quote, unquote_to_bytes

from qmpblock.address import Address, TCPAddress, UnixAddress, parse_address
from qmpblock.errors import RequestError, printable

__all__ = [
    "Credentials",
    "NBDTarget",
    "PathTarget",
    "Target",
    "credentials_object",
    "format_node",
    "nbd_node",
    "parse_target",
    "path_node",
]

_PORT = 10809  # IANA's, for NBD
_LONGEST_NAME = 4096  # bytes of an export's name, by the protocol
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>.*))?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_V6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[\w.-]+)?")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_REMEDY = "write nbd://HOST[:PORT]/EXPORT, nbds://..., nbd+unix:///EXPORT?socket=PATH, or a path"


@dataclass(frozen=True)
class PathTarget:
    """A file or a block device, by its path."""

    path: str

    def __str__(self) -> str:
        """Return the word, which `parse_target` reads as a path."""
        return f"./{self.path}" if _scheme(self.path) else self.path


@dataclass(frozen=True)
class NBDTarget:
    """An export of an NBD server.

    :ivar server: where it listens.
    :ivar export: the export's name; empty is the server's default.
    :ivar tls: whether the connection must have TLS.
    :ivar tls_hostname: whom the server's certificate must name; None: the host of `server`.
    """

    server: Address
    export: str
    tls: bool = False
    tls_hostname: str | None = None

    def __str__(self) -> str:
        """Return the URI, which `parse_target` reads as this very target."""
        scheme = "nbds" if self.tls else "nbd"
        query = []
        if isinstance(self.server, UnixAddress):
            where = f"{scheme}+unix://"
            query.append(f"socket={quote(self.server.path)}")
        else:
            host = self.server.host
            host = f"[{host.replace('%', '%25')}]" if ":" in host else host
            where = f"{scheme}://{host}:{self.server.port}"
        if self.tls_hostname is not None:
            query.append(f"tls-hostname={quote(self.tls_hostname)}")
        return f"{where}/{quote(self.export)}" + (f"?{'&'.join(query)}" if query else "")

    @property
    def certified_name(self) -> str | None:
        """Whom the server's certificate must name; None where that is not known."""
        if self.tls_hostname is not None:
            return self.tls_hostname
        return self.server.host if isinstance(self.server, TCPAddress) else None


Target = PathTarget | NBDTarget


@dataclass(frozen=True)
class Credentials:
    """With what QEMU proves itself to a server with TLS, and tests that one.

    :ivar directory: on QEMU's host, laid out as QEMU's tls-creds objects want it.
    :ivar kind: x509 certificates, or pre-shared keys.
    :ivar username: which of the keys; None: `qemu`, as QEMU has it.
    """

    directory: str
    kind: Literal["x509", "psk"] = "x509"
    username: str | None = None


# -- the word


def parse_target(text: str) -> Target:
    """Read the word that names the target of a copy. Nothing is looked up.

    :raise RequestError: it is empty, or a URI that is not understood to the last letter.
    """
    if not text or "\0" in text:
        raise RequestError(f"the target {printable(text)!r} names nothing", remedy=_REMEDY)
    try:
        text.encode()
    except UnicodeError:
        _refuse(text, "is not UTF-8, and QMP can carry nothing else")
    scheme = _scheme(text)
    if not scheme:
        return PathTarget(text)
    rest = text[len(scheme) + 1 :]
    if not rest.startswith("//"):
        _refuse(text, "is a notation of QEMU's own, which is not taken here")
    if "@" in re.split("[/?#]", rest[2:], maxsplit=1)[0]:
        raise RequestError(
            f"the target {scheme}://...@... has a user in it, which is not taken",
            remedy="give credentials as options, not in a URI, which others can see",
        )
    if scheme not in _SCHEMES:
        _refuse(text, f"is no target that a copy can have: {scheme} is none of its schemes")
    return _nbd(text, scheme, rest[2:])


def _scheme(text: str) -> str:
    """Return the scheme of what is meant as no path, in small letters; empty where it is one."""
    match = _SCHEME.fullmatch(text)
    if match is None:
        return ""
    scheme = match[1].lower()
    return scheme if match[2].startswith("//") or scheme in (*_SCHEMES, "json") else ""


def _nbd(text: str, scheme: str, rest: str) -> NBDTarget:
    if "#" in rest:
        _refuse(text, "has a fragment (#); in a name it is written %23")
    before, _, after = rest.partition("?")
    authority, slash, path = before.partition("/")
    query = _query(text, after)
    export = _decode(text, path)
    if len(export.encode()) > _LONGEST_NAME:
        _refuse(text, f"has an export's name of more than {_LONGEST_NAME} bytes")
    tls = scheme.startswith("nbds")
    hostname = query.pop("tls-hostname", None)
    if hostname is not None and not tls:
        _refuse(text, f"has a tls-hostname, but {scheme} is without TLS")
    if hostname is not None and not _HOST.fullmatch(hostname) and not _V6.fullmatch(hostname):
        _refuse(text, "has a tls-hostname that is no host's name")
    server: Address
    if scheme.endswith("+unix"):
        if authority:
            _refuse(text, f"has a host; after {scheme}: come three slashes")
        if not slash:
            _refuse(text, f"lacks a slash: after {scheme}: come three of them")
        socket = query.pop("socket", None)
        if not socket:
            _refuse(text, "says no socket: ?socket=PATH")
        server = parse_address(f"unix:{socket}")
    else:
        server = _host(text, authority)
    for key in query:
        _refuse(text, f"has an option that is not known: {printable(key)}")
    return NBDTarget(server, export, tls, hostname)


def _host(text: str, authority: str) -> TCPAddress:
    match = _AUTHORITY.fullmatch(authority)
    if match is None or ":" in (match["port"] or ""):
        _refuse(text, "has a host that is none; an IPv6 address is written in brackets")
    v6 = match["v6"]
    host = _decode(text, match["host"] if v6 is None else v6)
    if not (_HOST if v6 is None else _V6).fullmatch(host):
        _refuse(text, "has no host, or none that can be one")
    digits = match["port"]
    if digits is None:
        return TCPAddress(host, _PORT)
    if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
        _refuse(text, "has a port that is not in 1..65535")
    return TCPAddress(host, int(digits))


def _query(text: str, words: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for word in words.split("&") if words else ():
        key, equals, value = word.partition("=")
        key = _decode(text, key)
        if not equals:
            _refuse(text, f"has an option without a value: {printable(key)}")
        if key in query:
            _refuse(text, f"has the option {printable(key)} twice")
        query[key] = _decode(text, value)
    return query


def _decode(text: str, part: str) -> str:
    if _ESCAPE.search(part):
        _refuse(text, "has a % that no two hex digits follow; % itself is written %25")
    try:
        decoded = unquote_to_bytes(part).decode()
    except UnicodeError:
        _refuse(text, "is not UTF-8")
    if "\0" in decoded:
        _refuse(text, "has a NUL in it")
    return decoded


def _refuse(text: str, why: str) -> NoReturn:
    raise RequestError(
        f"the target {printable(text)} {why}",
        remedy=f"{_REMEDY}; for a file of that name: ./NAME",
    )


# -- the nodes


def path_node(
    target: PathTarget,
    node: str,
    *,
    block_device: bool,
    direct: bool = False,
    discard: str = "unmap",
) -> dict[str, object]:
    """Return the options of the protocol node that opens a file or a block device.

    :param node: its name.
    :param block_device: which of the two it is: QEMU refuses either driver for the other.
    :param direct: whether it is to be written past the host's page cache.
    :param discard: `ignore`: zeros keep their space there.
    """
    return {
        "driver": "host_device" if block_device else "file",
        "node-name": node,
        "filename": target.path,
        "discard": discard,
        "cache": {"direct": direct},
    }


def nbd_node(
    target: NBDTarget,
    node: str,
    *,
    socket: str,
    credentials: str | None = None,
    discard: str = "unmap",
) -> dict[str, object]:
    """Return the options of the protocol node that reaches an export by a relay of ours.

    It never connects again: it would to whatever is at that path by then.

    :param socket: the path of the relay's socket.
    :param credentials: the id of the tls-creds object, where the target has TLS.
    :param discard: `ignore`: zeros keep their space there, as far as the server goes.
    """
    options: dict[str, object] = {
        "driver": "nbd",
        "node-name": node,
        "server": {"type": "unix", "path": socket},
        "export": target.export,
        "reconnect-delay": 0,
        "discard": discard,
    }
    if target.tls:
        options["tls-creds"] = credentials
        if target.certified_name is not None:
            options["tls-hostname"] = target.certified_name
    return options


def format_node(
    name: str, node: str, protocol: str, *, detect_zeroes: bool = False
) -> dict[str, object]:
    """Return the options of the format node over a protocol node.

    :param name: the format (`raw`, `qcow2`).
    :param node: its name; `protocol`: that of the node below.
    :param detect_zeroes: whether zeros that are written as data become holes.
    """
    options: dict[str, object] = {
        "driver": name,
        "node-name": node,
        "file": protocol,
        "discard": "unmap",
        "detect-zeroes": "unmap" if detect_zeroes else "off",
    }
    if name == "qcow2":
        options["backing"] = None  # a header may name one; a target's is never read
    return options


def credentials_object(credentials: Credentials, name: str) -> dict[str, object]:
    """Return the arguments of object-add for what QEMU proves itself with, as a client."""
    options: dict[str, object] = {
        "qom-type": f"tls-creds-{credentials.kind}",
        "id": name,
        "endpoint": "client",
        "dir": credentials.directory,
    }
    if credentials.kind == "x509":
        options["verify-peer"] = True
    elif credentials.username is not None:
        options["username"] = credentials.username
    return options
