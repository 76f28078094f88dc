"""What a handshake settled: the export, what it can do, and which requests are legal on it.

Every request passes `Session.check` before a byte of it is sent: the protocol forbids a
client to send what was not offered, is unaligned, or reaches past the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from qmpblock.errors import RangeError, UnsupportedError, printable
from qmpblock.nbd.wire import (
    DEFAULT_BLOCK_SIZES,
    MAX_PAYLOAD,
    BlockSizes,
    Command,
    CommandFlag,
    HeaderStyle,
    TransmissionFlag,
)

__all__ = ["Limits", "Session"]

# What a server must have offered before a command, or a flag on one, may be sent.
_COMMAND_NEEDS: Mapping[Command, TransmissionFlag] = MappingProxyType(
    {
        Command.FLUSH: TransmissionFlag.SEND_FLUSH,
        Command.TRIM: TransmissionFlag.SEND_TRIM,
        Command.CACHE: TransmissionFlag.SEND_CACHE,
        Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
    }
)
_FLAG_NEEDS: Mapping[CommandFlag, TransmissionFlag] = MappingProxyType(
    {
        CommandFlag.FUA: TransmissionFlag.SEND_FUA,
        CommandFlag.NO_HOLE: TransmissionFlag.SEND_WRITE_ZEROES,
        CommandFlag.DF: TransmissionFlag.SEND_DF,
        CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
    }
)
# Long requests end on its multiples, so that those cut at the limit stay aligned to what
# lies below: 2 MiB, the largest cluster of qcow2, and more than any minimum block size.
LARGEST_CLUSTER = 2 << 20
_CHANGES = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})


@dataclass(frozen=True)
class Limits:
    """The longest request of each kind, in bytes, a multiple of the minimum block size.

    :param payload: one READ or WRITE on the wire; at most 32 MiB whatever the server says.
    :param cache: one CACHE. QEMU refuses more than 32 MiB, as if the data crossed the wire.
    :param effect: one WRITE_ZEROES or TRIM: 2 MiB below 2^32, or 2^63 with extended
        headers.
    :param block_status: one BLOCK_STATUS, likewise.
    """

    payload: int
    cache: int
    effect: int
    block_status: int

    def of(self, command: Command) -> int:
        """Return the longest request of one command."""
        if command in (Command.READ, Command.WRITE):
            return self.payload
        if command is Command.CACHE:
            return self.cache
        return self.block_status if command is Command.BLOCK_STATUS else self.effect


@dataclass(frozen=True)
class Session:
    """An export, as the server described it.

    :param export: the name it was asked for by.
    :param size: bytes.
    :param flags: what it can do.
    :param block_sizes: in bytes; the protocol's defaults if the server said nothing.
    :param style: how messages are framed.
    :param contexts: the negotiated metadata contexts, by the server's id.
    """

    export: str
    size: int
    flags: TransmissionFlag
    style: HeaderStyle
    block_sizes: BlockSizes = DEFAULT_BLOCK_SIZES
    contexts: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def limits(self) -> Limits:
        """The longest request of each kind."""
        block = self.block_sizes.minimum
        payload = min(self.block_sizes.maximum, MAX_PAYLOAD) // block * block
        bits = 63 if self.style is HeaderStyle.EXTENDED else 32
        widest = (1 << bits) - LARGEST_CLUSTER
        return Limits(payload=payload, cache=payload, effect=widest, block_status=widest)

    def can(self, flag: TransmissionFlag) -> bool:
        """Whether the server offered it."""
        return bool(self.flags & flag)

    def check(self, command: Command, offset: int, length: int, flags: CommandFlag) -> None:
        """Refuse a request that may not be sent; nothing was sent yet.

        :raise UnsupportedError: the server did not offer the command or a flag, the export
            is read-only, or no metadata context was negotiated.
        :raise RangeError: the range is empty, negative, unaligned to the minimum block size,
            past the end, or longer than the limit.
        """
        self._check_offered(command, flags)
        if command is not Command.FLUSH:
            self._check_range(command, offset, length)

    def check_bounds(self, command: Command, offset: int, length: int) -> None:
        """Refuse a range that is empty, unaligned or past the end, however it will be split.

        :raise RangeError: saying which.
        """
        block = self.block_sizes.minimum
        if offset < 0 or length < 1:
            wrong = ": an offset is at least 0 and a length at least 1"
        elif offset + length > self.size:
            wrong = f" reaches past the end of the export, {self.size} bytes"
        elif (offset | length) & (block - 1):
            wrong = f" is not aligned to the export's minimum block size, {block} bytes"
        else:
            return
        raise RangeError(f"{command.name} {offset}+{length}{wrong}")

    def _check_range(self, command: Command, offset: int, length: int) -> None:
        self.check_bounds(command, offset, length)
        limit = self.limits.of(command)
        if length > limit:
            raise RangeError(
                f"{command.name} {offset}+{length} is longer than this server's limit, "
                f"{limit} bytes",
                remedy="split it",
            )

    def _check_offered(self, command: Command, flags: CommandFlag) -> None:
        if command in _CHANGES and self.can(TransmissionFlag.READ_ONLY):
            raise self._unsupported(f"is read-only: {command.name} cannot be sent")
        needed = _COMMAND_NEEDS.get(command)
        if needed is not None and not self.can(needed):
            raise self._unsupported(f"does not offer {command.name}")
        for flag in flags if flags else ():  # looking for none among none takes its time
            needed = _FLAG_NEEDS.get(flag)
            if needed is not None and not self.can(needed):
                raise self._unsupported(f"does not offer {command.name} with {flag.name}")
        if command is Command.BLOCK_STATUS and not self.contexts:
            raise self._unsupported("granted no metadata context: it has no block status")

    def _unsupported(self, words: str) -> UnsupportedError:
        return UnsupportedError(f"the NBD export {printable(self.export)!r} {words}")
