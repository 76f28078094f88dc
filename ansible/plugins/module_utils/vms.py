"""What the inventory asks hosts about their VMs, and what it makes of the answers.

A VM's name is its own; so it goes into the inventory together with its host's, and of several that
bear the same there (or none) with its process. Anybody may start a VM of any name: what could be a
template, or a pattern of hosts, is none there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from shlex import quote

LOCAL = "localhost"


class HostError(Exception):
    """A host cannot be asked, or does not answer as it should."""


def question(host, ssh_args, executable):
    """Return the command line that asks a host."""
    words = [executable, "vms", "--json"]
    if host == LOCAL:
        return words
    user, name, port = place(host)
    return (
        ["ssh", "-o", "BatchMode=yes", *ssh_args]
        + (["-p", port] if port else [])
        + (["-l", user] if user else [])
        + ["--", name, " ".join(map(quote, words))]
    )


def place(host):
    """Split [USER@]HOST[:PORT]; what is not there is empty. An IPv6 address stands in brackets."""
    user, _at, rest = host.rpartition("@")
    if rest.startswith("["):
        name, _bracket, port = rest[1:].partition("]")
        return user, name, port.lstrip(":")
    name, _colon, port = rest.partition(":")
    return user, name, port


def read(host, code, out, err):
    """Return the VMs that a host has told of, each by its name in the inventory.

    :raise HostError: it did not, in its own words, or those of ssh.
    """
    if code:
        said = err.decode("utf-8", "replace").strip()
        raise HostError(f"exit code {code}: {said or 'it said nothing'}")
    try:
        found = json.loads(out)
        names = Counter(_tame(vm["name"]) for vm in found)
        return {_name(vm, names, host): vm for vm in found}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise HostError("it did not answer as `qmpblock vms --json` does") from None


def _name(vm, names, host):
    name = _tame(vm["name"]) or "process"
    if not vm["name"] or names[name] > 1:
        name = f"{name}-{vm['pid']}"
    return f"{name}@{place(host)[1] or host}"


def _tame(name):
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name)


def variables(host, vm, ssh_args):
    """Return the variables of a VM: how its host is reached, and what is known of it."""
    found = {"qmpblock_host": host}
    found.update({"qmpblock_" + key: value for key, value in vm.items()})
    if host == LOCAL:
        found["ansible_connection"] = "local"
        return found
    user, found["ansible_host"], port = place(host)
    if user:
        found["ansible_user"] = user
    if port:
        found["ansible_port"] = int(port)
    if ssh_args:
        found["ansible_ssh_extra_args"] = " ".join(map(quote, ssh_args))
    return found


def groups_of(host, vm):
    """Return the groups of a VM: of all, of its host, of its manager."""
    manager, on = vm["manager"], "on_" + (place(host)[1] or host)
    by = "managed_by_" + manager["name"] if manager else "unmanaged"
    return [re.sub(r"\W", "_", name, flags=re.ASCII) for name in ("qmpblock_vms", on, by)]
