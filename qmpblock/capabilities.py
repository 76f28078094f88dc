"""What this QEMU can do safely, asked by name.

What a QEMU has, its schema tells. What no schema shows, because it is a defect and not a
feature, is gated here, by version, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpblock.errors import UnsupportedError

__all__ = ["Capabilities"]

_OLDEST = (7, 2, 0)


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of one QEMU.

    :ivar version: major, minor, micro.
    """

    version: tuple[int, int, int]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))

    def check_supported(self) -> None:
        """Refuse a QEMU that nothing here was tried on.

        :raise UnsupportedError: it is older than 7.2.
        """
        if self.version < _OLDEST:
            raise UnsupportedError(
                f"QEMU {self} is older than 7.2, the oldest that qmpblock supports",
                standing="nothing was touched",
            )

    @property
    def nbd_disconnect_aborts_iothread(self) -> bool:
        """Whether an NBD client that goes away aborts QEMU when its node is in an iothread.

        qemu-facts, K1: 7.2 does; 10.0.13 and 11.1.3 do not. What lies between was not run
        and counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def nbd_server_stop_hangs_in_handshake(self) -> bool:
        """Whether nbd-server-stop never returns while a client's handshake is incomplete.

        Measured: 7.2.22 hangs, with the guest; 10.0.13 and 11.1.2 do not.
        """
        return self.version < (10, 0, 0)

    @property
    def nbd_client_aborts_on_context_switch(self) -> bool:
        """Whether QEMU may abort when a node with an NBD client changes its AioContext.

        A guest that resets its virtio device, or boots, starts and stops the disk's
        iothread. Measured on 7.2.22: 22 of 64 quick guest resets with an idle client ended in
        `blk_aio_attached: Assertion client->recv_coroutine == NULL`. The cause is a receive
        coroutine that was scheduled by the end of one drain and has not run when the next
        one polls; reworked upstream for 9.0, and not run between 7.2 and 10.0.
        """
        return self.version < (10, 0, 0)
