"""Over: by which network a migration's disks and memory go, where that is TCP. Pure.

::

    nbds://HOST[:PORT]                      with TLS; PORT: of the disks, the next of the memory
    nbds://HOST[:PORT]/?tls-hostname=NAME   the certificate there names NAME
    nbd://HOST[:PORT]                       without TLS

HOST is where the destination's QEMU listens. Both ends have credentials of one kind, each in a
directory on its own host, and the same for disks and memory: those of the disks are tried before
anything is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpblock.address import TCPAddress
from qmpblock.copying.target import Credentials, NBDTarget, parse_target
from qmpblock.errors import UNTOUCHED, RequestError, printable

__all__ = ["Over", "parse_over", "read_over"]

_LAST_PORT = 65535


@dataclass(frozen=True)
class Over:
    """A way for disks and memory. Made by `read_over`.

    :ivar disks: where the destination serves its disks; `memory`: where it waits for the memory.
    :ivar hostname: whom its certificate must name; None: without TLS, or with keys.
    :ivar here: the source's credentials; `there`: the destination's; None: without TLS.
    """

    disks: TCPAddress
    hostname: str | None = None
    here: Credentials | None = None
    there: Credentials | None = None

    @property
    def memory(self) -> TCPAddress:
        """Where the destination waits for the memory."""
        return TCPAddress(self.disks.host, self.disks.port + 1)

    def target(self, export: str) -> NBDTarget:
        """Return an export of the destination's."""
        return NBDTarget(self.disks, export, self.here is not None, self.hostname)


def parse_over(text: str) -> tuple[NBDTarget, TCPAddress]:
    """Read the word that names the way, whatever there is for TLS; return its server, too.

    :raise RequestError: it names none.
    """
    target = parse_target(text)
    server = target.server if isinstance(target, NBDTarget) else None
    if not isinstance(target, NBDTarget) or not isinstance(server, TCPAddress) or target.export:
        raise RequestError(
            f"{printable(text)} is no way for a migration",
            standing=UNTOUCHED,
            remedy="write nbds://HOST[:PORT], HOST being the destination's",
        )
    if server.port >= _LAST_PORT:
        raise RequestError(f"after the port {server.port} there is none for the memory")
    return target, server


def read_over(
    text: str, here: Credentials | None, there: Credentials | None, *, insecure: bool
) -> Over:
    """Read the word that names the way, with what there is for TLS.

    :param here: the source's credentials; `there`: the destination's.
    :param insecure: whether it may be without TLS.
    :raise RequestError: it names none, or TLS and credentials do not go together.
    """
    target, server = parse_over(text)
    if not target.tls:
        if here is not None or there is not None or not insecure:
            raise RequestError(
                f"{printable(text)} is without TLS: whoever is on the way could read the guest's "
                "disks and memory, and write to its disks",
                standing=UNTOUCHED,
                remedy="write nbds://, and give --tls-creds DIR; or, on a network that you trust, "
                "--insecure without them",
            )
        return Over(server)
    if here is None or there is None:
        raise RequestError(
            f"{printable(text)} has TLS, for which both ends need credentials",
            standing=UNTOUCHED,
            remedy="give --tls-creds DIR, a directory on either host, laid out as for QEMU: the "
            "client's part here, the server's there; or keys.psk in both",
        )
    hostname = target.certified_name if here.kind == "x509" else None
    return Over(server, hostname, here, there)
