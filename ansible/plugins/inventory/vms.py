# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
name: vms
short_description: The VMs of many hosts, whoever runs them
description:
  - Asks each of a list of hosts, by ssh, which VMs run there (C(qmpblock vms)), and makes an inventory of them. What
    is told of a VM is asked of its monitor, with queries alone.
  - Each VM is a host of the inventory, C(NAME@HOST), by which Ansible gets to the host that the VM runs on. The
    modules of this collection do their work there, with C({{ qmpblock_address }}) as O(qmpblock.qmpblock.disk_info#module:address).
version_added: 0.1.0
author:
  - The qmpblock authors (@qmpblock)
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: The name of this plugin.
    type: str
    required: true
    choices: [qmpblock.qmpblock.vms]
  hosts:
    description:
      - The hosts, each as C([USER@]HOST[:PORT]), with whatever C(ssh) itself is configured to do for them.
      - V(localhost) is asked without ssh.
    type: list
    elements: str
    required: true
  executable:
    description: The command qmpblock on the hosts, by a name in the path there, or a path.
    type: str
    default: qmpblock
  ssh_args:
    description: More words for C(ssh); Ansible has them, too, for the VMs that are found (C(ansible_ssh_extra_args)).
    type: list
    elements: str
    default: []
  forks:
    description: How many hosts are asked at once.
    type: int
    default: 20
  timeout:
    description: After so many seconds a host that has not answered is given up.
    type: int
    default: 60
  unreachable:
    description:
      - What becomes of the inventory where a host cannot be asked. With V(fail) there is none; with V(warn) its VMs
        are missing.
    type: str
    choices: [fail, warn]
    default: fail
"""

EXAMPLES = r"""
# vms.qmpblock.yml
plugin: qmpblock.qmpblock.vms
hosts:
  - hv1.example
  - root@hv2.example:2222
executable: /opt/qmpblock/bin/qmpblock
# Groups beside those that it makes: qmpblock_vms, on_HOST, managed_by_MANAGER, unmanaged.
groups:
  chained: qmpblock_disks | selectattr('layers', 'gt', 1) | list | length > 0
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor

from ansible.errors import AnsibleParserError
from ansible.utils.unsafe_proxy import wrap_var
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.vms import (
    HostError,
    groups_of,
    question,
    read,
    variables,
)

from ansible.plugins.inventory import BaseInventoryPlugin, Constructable

SUFFIXES = ("qmpblock.yml", "qmpblock.yaml")


class InventoryModule(BaseInventoryPlugin, Constructable):
    """Asks the hosts, and adds what they say."""

    NAME = "qmpblock.qmpblock.vms"

    def verify_file(self, path):
        """Whether a file is for this plugin, by its name."""
        return super().verify_file(path) and path.endswith(SUFFIXES)

    def parse(self, inventory, loader, path, cache=True):
        """Add the VMs of all hosts.

        :raise AnsibleParserError: a host cannot be asked, and that is to fail.
        """
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        hosts = self.get_option("hosts")
        with ThreadPoolExecutor(max(1, self.get_option("forks"))) as pool:
            for host, found in zip(hosts, pool.map(self._asked, hosts), strict=True):
                if isinstance(found, HostError):
                    if self.get_option("unreachable") == "fail":
                        raise AnsibleParserError(f"{host}: {found}")
                    self.display.warning(f"{host}: {found}; its VMs are missing")
                    continue
                for name, vm in found.items():
                    self._add(name, host, vm)

    def _asked(self, host):
        words = question(host, self.get_option("ssh_args"), self.get_option("executable"))
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=self.get_option("timeout"),
            )
            return read(host, done.returncode, done.stdout, done.stderr)
        except subprocess.TimeoutExpired as late:
            return HostError(f"no answer within {late.timeout:g} s")
        except (OSError, HostError) as error:
            return HostError(str(error))

    def _add(self, name, host, vm):
        self.inventory.add_host(name)
        for variable, value in variables(host, vm, self.get_option("ssh_args")).items():
            self.inventory.set_variable(name, variable, wrap_var(value))  # others chose it
        for group in groups_of(host, vm):
            self.inventory.add_group(group)
            self.inventory.add_child(group, name)
        known = self.inventory.get_host(name).get_vars()
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), known, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), known, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), known, name, strict=strict)
