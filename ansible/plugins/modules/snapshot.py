#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot
short_description: Freeze the active layers of running disks at one point in time
description:
  - Has the writes of one or several disks of a running VM go to new overlays from one point in time on, as
    C(qmpblock snapshot) does. What was the active layer holds that point.
  - An overlay that is in its disk's chain already is left alone, whatever lies above it by now.
  - The VM is to be started from the overlays from then on.
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
    description: Says whether there are overlays to be made; whether QEMU would is found out when it does.
  diff_mode:
    support: none
    description: What is made is returned.
options:
  overlays:
    description:
      - For each disk (a qdev id, QOM path, node name or file name of the active image) the file of its
        overlay, an absolute path. No such file may be there.
      - Several disks are frozen at one point in time. Where some of the overlays are there and some
        are not, the module fails, for those that are missing would be of another point.
    type: dict
    required: true
  format:
    description:
      - Of the overlays.
    type: str
    choices: [qcow2, qed]
    default: qcow2
  backing_name:
    description:
      - How an overlay records the image below it.
    type: str
    choices: [relative, absolute]
    default: relative
"""

EXAMPLES = r"""
- name: Before the upgrade
  qmpblock.qmpblock.snapshot:
    address: /run/vm/web.qmp
    overlays:
      vd0: /srv/web-after.qcow2
      vd1: /srv/data-after.qcow2
"""

RETURN = r"""
overlays:
  description: Those that were made, as docs/schema/snapshot.schema.json; empty where none was.
  returned: success
  type: list
  elements: dict
  sample:
    - disk: vd0
      file: /srv/web-after.qcow2
      node: qmpblock-x7k2m9qd-overlay
      frozen: /srv/web.qcow2
      backing_name: web.qcow2
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.chains import missing_overlays
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
            overlays={"type": "dict", "required": True},
            format={"type": "str", "choices": ["qcow2", "qed"], "default": "qcow2"},
            backing_name={
                "type": "str",
                "choices": ["relative", "absolute"],
                "default": "relative",
            },
            **CHANGES,
        ),
        supports_check_mode=True,
    )
    overlays, address = module.params["overlays"], module.params["address"]
    wrong = not_absolute(overlays, "overlays")
    if wrong:
        module.fail_json(msg=wrong)
    qmpblock = Command(module)
    missing = missing_overlays(qmpblock.run("disks", address).document, overlays, os.path.realpath)
    if missing and len(missing) < len(overlays):
        module.fail_json(
            msg="of {} there is no overlay yet, and of the others there is: one that is made now "
            "would be of another point in time. Nothing was touched".format(
                ", ".join(f"{disk} ({overlays[disk]})" for disk in missing)
            )
        )
    made = []
    if missing and not module.check_mode:
        words = [f"{disk}={overlays[disk]}" for disk in missing]
        words += ["--format", module.params["format"]]
        words += ["--backing-name", module.params["backing_name"]]
        words += changing_words(module.params)
        made = qmpblock.run("snapshot", address, *words).document["overlays"]
    module.exit_json(changed=bool(missing), overlays=made)


if __name__ == "__main__":
    main()
