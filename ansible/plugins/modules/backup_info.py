#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: Tell which backups a directory holds, and whether they are whole
description:
  - Tells which backups a directory holds, as C(qmpblock backup list) does, and how old the newest is.
  - It needs no VM, and changes nothing.
version_added: 0.1.0
author:
  - The qmpblock authors (@qmpblock)
extends_documentation_fragment:
  - qmpblock.qmpblock.command
attributes:
  check_mode:
    support: full
    description: Changes nothing in any mode.
  diff_mode:
    support: none
    description: Changes nothing.
options:
  directory:
    description:
      - Of backups of one VM, by an absolute path. Where there is no such directory, the module fails.
    type: path
    required: true
  check:
    description:
      - Read every byte of every image, too, as C(qmpblock backup check) does. Where a backup is not whole, the
        module fails, and says what is wrong.
    type: bool
    default: false
seealso:
  - module: qmpblock.qmpblock.backup
"""

EXAMPLES = r"""
- name: Which backups are there of it?
  qmpblock.qmpblock.backup_info:
    directory: /srv/backups/web
  register: web

- name: The newest is of the last day
  ansible.builtin.assert:
    that: web.age is not none and web.age < 86400

- name: Every week, they all are what they were
  qmpblock.qmpblock.backup_info:
    directory: /srv/backups/web
    check: true
  async: 86400
  poll: 30
"""

RETURN = r"""
points:
  description: The backups, oldest first, each as docs/schema/backup-point.schema.json has it.
  returned: success
  type: list
  elements: dict
  sample:
    - when: 20261130T110500Z
      time: "2026-11-30T11:05:00.213+00:00"
      vm: {name: web, uuid: ""}
      disks:
        - {disk: vd0, file: 20261130T110500Z-vd0.qcow2, parent: null, size: 67108864, length: 2162688}
age:
  description:
    - How many seconds ago the newest of them was of, by the clock of the host where the module runs.
    - Null where there is none.
  returned: success
  type: float
  sample: 41521.3
checked:
  description: What was found of each, as docs/schema/backup-check.schema.json. Where it fails, that is C(document).
  returned: with O(check)
  type: dict
  sample:
    directory: /srv/backups/web
    points: [{when: 20261130T110500Z, time: "2026-11-30T11:05:00.213+00:00", disks: [vd0], faults: []}]
    whole: true
    read: 2162688
    seconds: 0.01
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.backups import age
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.command import OPTIONS, Command
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.policies import not_absolute


def main():
    module = AnsibleModule(
        argument_spec=dict(
            OPTIONS,
            directory={"type": "path", "required": True},
            check={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    directory = module.params["directory"]
    wrong = not_absolute({"directory": directory}, "directory")
    if wrong:
        module.fail_json(msg=wrong)
    qmpblock = Command(module)
    points = qmpblock.run("backup", "list", directory).document["points"]
    result = {"changed": False, "points": points, "age": age(points, time.time())}
    if module.params["check"]:
        result["checked"] = qmpblock.run("backup", "check", directory).document
    module.exit_json(**result)


if __name__ == "__main__":
    main()
