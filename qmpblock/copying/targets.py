"""Which kind of target a word means, and a plan asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qmpblock.chains.overlay import open_directory
from qmpblock.copying.devicetarget import DeviceTarget, claimed
from qmpblock.copying.partialfile import find_partial
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.target import Credentials, NBDTarget, parse_target
from qmpblock.copying.targetfile import TargetFile
from qmpblock.copying.targetname import absolute
from qmpblock.copying.wire import check_target
from qmpblock.copying.wiretarget import WireTarget
from qmpblock.errors import UNTOUCHED, RequestError

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["check_servers", "place_of", "target_of"]


def place_of(target: str | os.PathLike[str]) -> str | NBDTarget:
    """Return the absolute path of a file, or an export; what is no string is a path.

    :raise RequestError: it is neither.
    """
    word = parse_target(target) if isinstance(target, str) else None
    return word if isinstance(word, NBDTarget) else absolute(word.path if word else target)


def check_servers(
    vm: Connection, plans: Sequence[CopyPlan], credentials: Credentials | None
) -> None:
    """Refuse servers that cannot be reached so, by the words alone.

    :param credentials: for those with TLS.
    :raise RequestError: they are needed, or of no use.
    :raise UnsupportedError: QEMU is on another host.
    """
    servers = [plan.server for plan in plans if plan.server is not None]
    for server in servers:
        check_target(vm, server, credentials if server.tls else None)
    if credentials is not None and not any(server.tls for server in servers):
        raise RequestError(
            "TLS credentials are given, and no target has TLS",
            standing=UNTOUCHED,
            remedy="give them with nbds:// or nbds+unix:// only",
        )


@contextmanager
def target_of(
    vm: Connection,
    plan: CopyPlan,
    node: str,
    number: int,
    backing_name: str | None,
    credentials: Credentials | None,
    *,
    force: bool,
    pivots: bool,
    resume: bool,
) -> Iterator[CopyTarget]:
    """Have what a plan asks for, while this lasts: the directory of a file, or a device.

    :param node: its name; `number`: of the targets.
    :param resume: whether the copy goes on from what is there, if anything is.
    :raise Error: it cannot be had; nothing was touched.
    """
    if plan.server is not None:
        its = credentials if plan.server.tls else None
        yield WireTarget(plan, node, number, its, resumed=resume, keeps=resume)
    elif plan.block_device:
        with claimed(vm.monitor.peer_pid, plan, force=force) as fd:
            yield DeviceTarget(plan, node, fd, resumed=resume, keeps=resume)
    else:
        with open_directory(plan.file) as directory:
            found = find_partial(directory, plan, backing_name) if resume else None
            yield TargetFile(
                plan,
                node,
                directory,
                pivots,
                backing_name=backing_name,
                replaces=force,
                made=found,
                resumed=found is not None,
                keeps=found is not None,
            )
