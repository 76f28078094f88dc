"""The command as `python -m qmpblock`, forked off one process that has imported all of it.

An interpreter takes a third of a second of a processor until it has, and a run of the tests has a
thousand commands. Nothing else is spared: each is a process of its own, with its own streams,
environment and directory, which begins where `-m qmpblock` begins and ends as an interpreter does.
Tests that interrupt, trace or install the command start it themselves.

As a program it is told of each command by a socket, which is its only argument.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["forked"]

_MOST = 1 << 20  # bytes of a request
_servers: dict[tuple[tuple[str, str], ...], _Server] = {}


class _Server:
    """The process, as seen by who wants commands."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(number)],
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # a thread is not forked
            )
        atexit.register(self.end)

    def end(self) -> None:
        """End it: nobody will want another one."""
        self.socket.close()
        self._process.wait()


def _server(environment: Mapping[str, str]) -> _Server:
    """Return the one whose interpreter was told the same by the environment."""
    told = tuple(sorted(one for one in environment.items() if one[0].startswith("PYTHON")))
    if told not in _servers:
        _servers[told] = _Server(environment)
    return _servers[told]


async def forked(
    *arguments: str | os.PathLike[str], environment: Mapping[str, str]
) -> tuple[int, str, str]:
    """Run `qmpblock`; return its exit code (negative: the signal that ended it), stdout and stderr.

    Cancelling leaves it alone.
    """
    server = _server(environment)
    request = {
        "arguments": [os.fspath(one) for one in arguments],
        "environment": dict(environment),
        "directory": os.getcwd(),
    }
    ours, theirs = zip(*(os.pipe() for _ in range(3)), strict=True)
    try:
        socket.send_fds(server.socket, [json.dumps(request).encode()], theirs)
    finally:
        for one in theirs:
            os.close(one)
    out, err, code = await asyncio.gather(*(_all(one) for one in ours))
    return int(code), out.decode(), err.decode()


async def _all(pipe: int) -> bytes:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), io.FileIO(pipe)
    )
    try:
        return await reader.read()
    finally:
        transport.close()


# -- the process itself


def _serve(listener: socket.socket) -> bool:
    """Fork commands until nobody wants any; return whether this is a command."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not listener:
                pid, told = key.data
                _, status = os.waitpid(pid, 0)
                os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
                os.close(told)
                selector.unregister(key.fileobj)
                os.close(key.fd)
                continue
            request, streams, _, _ = socket.recv_fds(listener, _MOST, 3)
            if not request:
                return False
            pid = os.fork()
            if pid == 0:
                selector.close()
                listener.detach()
                _become(json.loads(request), *streams[:2])
                return True
            for one in streams[:2]:
                os.close(one)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, streams[2]))


def _become(request: dict[str, Any], out: int, err: int) -> None:
    """Be what a new interpreter is that has been asked for this; stdin leads nowhere."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = ["", *request["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_all() -> None:
    import qmpblock

    for module in pkgutil.walk_packages(qmpblock.__path__, "qmpblock."):
        if not module.name.endswith("__main__") and ".testing" not in module.name:
            with contextlib.suppress(ModuleNotFoundError):  # of an extra
                importlib.import_module(module.name)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the commands
    _import_all()
    gc.freeze()
    if _serve(socket.socket(fileno=int(sys.argv.pop()))):
        runpy.run_module("qmpblock", run_name="__main__", alter_sys=True)
