"""TCP ports of this host that nobody has, and that the kernel gives to nobody."""

import contextlib
import random
import socket
from pathlib import Path


def free_ports(count=1):
    """Return the first of so many in a row."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    while True:
        first = random.SystemRandom().randrange(10_000, max(20_000, int(limits[0])))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
