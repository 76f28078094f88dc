#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup
short_description: Back up running disks into a directory
description:
  - Backs up one or several disks of a running VM, all of one instant, while the guest goes on, as
    C(qmpblock backup) does. The first backup in a directory holds everything, the next ones what was written
    since the one before.
  - Each run makes one, and so is C(changed). RV(qmpblock.qmpblock.backup_info#module:age) tells whether one is due.
  - Nothing is ever removed from a directory.
version_added: 0.1.0
author:
  - The qmpblock authors (@qmpblock)
extends_documentation_fragment:
  - qmpblock.qmpblock.command
  - qmpblock.qmpblock.command.vm
  - qmpblock.qmpblock.command.changes
attributes:
  check_mode:
    support: full
    description: C(qmpblock backup) with C(--dry-run) says what it would be, and what that takes, or why there can be none.
  diff_mode:
    support: full
    description: Shows the images of the directory, before and after; in check mode as they would be.
notes:
  - What takes long is best begun with C(async) and C(poll).
  - A backup that failed, or was ended, is none, leaves nothing, and costs no full one.
options:
  directory:
    description:
      - For the backups of this VM alone, by an absolute path. It is made, if what it lies in is there.
    type: path
    required: true
  disks:
    description:
      - Which (a qdev id, QOM path, drive id, node name or file name of the active image). By default all
        that the guest may write to.
    type: list
    elements: str
    default: []
  kind:
    description:
      - By default a backup is incremental where that is right, disk by disk, and else full, which says why.
      - With V(incremental) the module fails where it would be full.
    type: str
    choices: [full, incremental]
  compress:
    description:
      - Compress what the images hold.
    type: bool
    default: false
  verify:
    description:
      - Compare each image, with what it lies on, with the very instant of which it is.
    type: bool
    default: false
  latency:
    description:
      - Copy no faster than lets the guest's own requests take so long, as V(20ms).
    type: str
  speed:
    description:
      - Bytes a second (K, M, G) of all disks together; V(0) is no limit.
    type: str
  fleece:
    description:
      - Directory where is kept what the guest overwrites meanwhile.
    type: path
  fleece_limit:
    description:
      - How much of that at most, for each disk.
    type: str
seealso:
  - module: qmpblock.qmpblock.backup_info
  - module: qmpblock.qmpblock.copy
"""

EXAMPLES = r"""
- name: Tonight's
  qmpblock.qmpblock.backup:
    address: /run/vm/web.qmp
    directory: /srv/backups/web
    latency: 20ms
  async: 86400
  poll: 30

- name: Once a month, one that holds everything
  qmpblock.qmpblock.backup:
    address: /run/vm/web.qmp
    directory: /srv/backups/web
    kind: full
    verify: true
"""

RETURN = r"""
planned:
  description: What the backup would be, as docs/schema/backup-plan.schema.json has it. Files are called by when it begins.
  returned: in check mode
  type: dict
  sample:
    directory: /srv/backups/web
    new: true
    when: 20261130T110500Z
    disks:
      - disk: vd0
        kind: full
        reason: there is no backup of this disk yet
        parent: null
        target: /srv/backups/web/20261130T110500Z-vd0.qcow2
        write: 2097152
made:
  description: The backup, as docs/schema/backup.schema.json has it.
  returned: not in check mode
  type: dict
  sample:
    directory: /srv/backups/web
    point: {when: 20261130T110500Z, time: "2026-11-30T11:05:00.213+00:00", vm: {name: web, uuid: ""}}
    seconds: 0.7
    held: 0.002
    verified: false
    warnings: []
images:
  description: Those that it is made of.
  returned: not in check mode
  type: list
  elements: dict
  sample:
    - disk: vd0
      file: /srv/backups/web/20261130T110500Z-vd0.qcow2
      kind: full
      reason: there is no backup of this disk yet
      length: 2162688
  contains:
    disk:
      description: What the disk is called.
      returned: success
      type: str
    file:
      description: The image, absolute.
      returned: success
      type: str
    kind:
      description: V(full), or V(incremental) where it lies on one of the backup before.
      returned: success
      type: str
    reason:
      description: Why it is full; empty where it is not.
      returned: success
      type: str
    length:
      description: Bytes of the file.
      returned: success
      type: int
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils import backups
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.command import (
    CHANGES,
    VM,
    Command,
    changing_words,
)
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.policies import not_absolute


def main():
    module = AnsibleModule(
        argument_spec=dict(
            VM,
            directory={"type": "path", "required": True},
            disks={"type": "list", "elements": "str", "default": []},
            kind={"type": "str", "choices": ["full", "incremental"]},
            compress={"type": "bool", "default": False},
            verify={"type": "bool", "default": False},
            latency={"type": "str"},
            speed={"type": "str"},
            fleece={"type": "path"},
            fleece_limit={"type": "str"},
            **CHANGES,
        ),
        supports_check_mode=True,
    )
    params = module.params
    address, directory = params["address"], params["directory"]
    wrong = not_absolute({"directory": directory}, "directory")
    if wrong:
        module.fail_json(msg=wrong)
    if address in ("list", "check"):  # words of the command's own
        address = "./" + address
    qmpblock, words = Command(module), backups.words(params) + changing_words(params)
    points = []
    if module._diff and Path(directory).is_dir():
        points = qmpblock.run("backup", "list", directory).document["points"]
    if module.check_mode:
        planned = qmpblock.run("backup", address, directory, *words, "--dry-run").document
        result, new = {"planned": planned}, backups.foreseen(planned)
    else:
        made = qmpblock.run("backup", address, directory, *words).document
        result, new = {"made": made, "images": backups.images(made)}, made["point"]["disks"]
    if module._diff:
        result["diff"] = backups.difference(directory, points, new)
    module.exit_json(changed=True, **result)


if __name__ == "__main__":
    main()
