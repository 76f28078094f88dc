"""What is said of the options of every module, of those of one VM, of those that change something."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  executable:
    description:
      - The command qmpblock on that host, by a name in the path, or a path.
    type: path
    default: qmpblock
  stall:
    description:
      - No progress for so many seconds is a failure. By default what the command has, a minute.
    type: float
requirements:
  - qmpblock on the host where the module runs
notes:
  - The module fails in the words of the command; C(rc) is its exit code, and C(outcome) says what that means. Runs
    of an earlier playbook that stand in the way are in C(running).
"""

    VM = r"""
options:
  address:
    description:
      - The VM's monitor, as qmpblock takes it on the host where the module runs.
      - A UNIX socket path, V(unix:PATH), V(HOST:PORT), V(libvirt:DOMAIN), V(incus:INSTANCE).
    type: str
    required: true
  nbd:
    description:
      - The address of a foreign NBD server that already runs in this VM.
    type: str
  tls_creds:
    description:
      - Directory of TLS credentials for NBD over TCP.
    type: path
  insecure:
    description:
      - Allow NBD over TCP without TLS.
    type: bool
    default: false
"""

    CHANGES = r"""
options:
  unmanaged:
    description:
      - Do it also where libvirt or another manager owns the chain, and will not know of it.
    type: bool
    default: false
  end_running:
    description:
      - What an interrupted playbook has begun on a host goes on there to its end. Where such a run stands
        in the way, the module fails and names it. With this it ends the run instead, waits until that has
        undone what it had begun, and goes on.
      - Only runs that a playbook began are ended; what a person has begun at a terminal never is.
    type: bool
    default: false
"""
