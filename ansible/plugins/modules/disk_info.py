#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: disk_info
short_description: Tell what disks a running VM has
description:
  - Tells of each disk of a running VM its layers, filters, jobs and exports, as C(qmpblock disks) does.
  - It changes nothing.
version_added: 0.1.0
author:
  - The qmpblock authors (@qmpblock)
extends_documentation_fragment:
  - qmpblock.qmpblock.command
  - qmpblock.qmpblock.command.vm
attributes:
  check_mode:
    support: full
    description: Changes nothing in any mode.
  diff_mode:
    support: none
    description: Changes nothing.
options:
  totals:
    description:
      - Tell how many bytes each layer supplies, too, as C(qmpblock map --totals) does. That takes an
        export in the VM for a moment.
    type: bool
    default: false
  runs:
    description:
      - Tell what qmpblock is at work on in this VM, or has left there when it was killed, too.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: What disks has it, and what do they take?
  qmpblock.qmpblock.disk_info:
    address: /run/vm/web.qmp
    totals: true
  register: web

- name: None of them depends on a template
  ansible.builtin.assert:
    that: web.disks | map(attribute='layers') | map('length') | max == 1
"""

RETURN = r"""
disks:
  description: The VM's disks, each as docs/schema/disks.schema.json has it, in QEMU's order.
  returned: success
  type: list
  elements: dict
  sample:
    - device: vd0
      size: 67108864
      read_only: false
      layers:
        - {depth: 0, node: active, file: /srv/active.qcow2, format: qcow2, size: 67108864}
  contains:
    device:
      description: What a disk is called.
      returned: success
      type: str
    layers:
      description: The backing chain, the active layer first.
      returned: success
      type: list
      elements: dict
    totals:
      description: As docs/schema/map-totals.schema.json; null of a drive that is empty or served elsewhere.
      returned: with O(totals)
      type: dict
runs:
  description: What is at work there, or was left by a run that died, as docs/schema/recover.schema.json.
  returned: with O(runs)
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.command import VM, Command


def main():
    module = AnsibleModule(
        argument_spec=dict(
            VM,
            totals={"type": "bool", "default": False},
            runs={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    qmpblock, address = Command(module), module.params["address"]
    result = {"changed": False, "disks": qmpblock.run("disks", address).document}
    if module.params["totals"]:
        for disk in result["disks"]:
            words = ("map", address, disk["device"], "--totals")
            disk["totals"] = qmpblock.run(*words).document if disk["layers"] else None
    if module.params["runs"]:
        result["runs"] = qmpblock.run("recover", address, "--dry-run").document
    module.exit_json(**result)


if __name__ == "__main__":
    main()
