"""The command, sent signals at a step of its work that is told by a function."""

import asyncio
import signal
import sys

#: The command, to which a signal is sent once a function has returned.
SIGNALLED = """
import asyncio, functools, importlib, os, sys
module, names, number, times, *words = sys.argv[1:]
*owners, name = names.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
real = getattr(owner, name)

def strike(ended):
    for _ in range(int(times)):
        os.kill(os.getpid(), int(number))
    return ended

async def awaited(*given, **named):
    return strike(await real(*given, **named))

def called(*given, **named):
    return strike(real(*given, **named))

setattr(owner, name, awaited if asyncio.iscoroutinefunction(real) else called)
from qmpblock.cli.app import run
sys.exit(run(words))
"""
SIGNALS = [(signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)]


async def signalled(after, number, times, *words):
    """Run a command that is sent a signal after a step; return how it ended, and what it said."""
    module, _, name = after.partition(":")
    program = (sys.executable, "-c", SIGNALLED, module, name, str(int(number)), str(times))
    process = await asyncio.create_subprocess_exec(
        *program,
        *map(str, words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()
