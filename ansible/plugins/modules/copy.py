#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: copy
short_description: Have copies of running disks be there
description:
  - Has copies of one or several disks of a running VM be there, all of one instant, made while the guest goes
    on, as C(qmpblock copy) does, by a policy of C(qmpblock apply).
  - A copy that bears its name is whole, and left alone, however old it is. To have a newer one, name another
    file, or move the old one away.
  - What an interrupted copy left is gone on from.
  - It makes copies for whatever is to be done with them; it keeps no history and no increments, which
    M(qmpblock.qmpblock.backup) does.
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
    description: C(qmpblock plan) says how it would be made, what that takes, and what cannot be.
  diff_mode:
    support: none
    description: What is made is returned.
notes:
  - What takes long is best begun with C(async) and C(poll). It goes on where it was when it is begun again.
options:
  copies:
    description:
      - For each disk (a qdev id, QOM path, drive id, node name or file name of the active image) the file of
        its copy, an absolute path on the host.
      - Where some of the copies are there and some are not, the module fails, for those that are missing would
        be of another instant; with O(force) all are made anew.
    type: dict
    required: true
  at:
    description:
      - Of which moment they are, of that in which the copy begins, or ends.
    type: str
    choices: [start, end]
  format:
    description:
      - By default what the active layer is.
    type: str
    choices: [qcow2, raw]
  layers:
    description:
      - Copy the whole chain, or the active layer, over the same backing image.
    type: str
    choices: [all, top]
  allocation:
    description:
      - What of the copy has host space, what it holds but no zeros, every byte, or what the disk has it for.
    type: str
    choices: [thin, full, like]
  cluster_size:
    description:
      - Of a qcow2 copy, from 512 to 2M.
    type: str
  compress:
    description:
      - Compress a qcow2 copy.
    type: bool
    default: false
  direct:
    description:
      - Write past the host's page cache.
    type: bool
    default: false
  reflink:
    description:
      - Share the blocks of the disk's files, on a file system that can.
    type: bool
    default: false
  force:
    description:
      - Replace a file that bears the name and is no copy of the disk.
    type: bool
    default: false
  verify:
    description:
      - Compare each copy with the very point that it is of.
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
  keep_free:
    description:
      - What has to stay free on the file systems of the copies, in bytes (K, M, G) or percent.
    type: str
  fleece:
    description:
      - Directory where is kept what the guest overwrites meanwhile.
    type: path
  fleece_limit:
    description:
      - How much of that at most, for each disk.
    type: str
"""

EXAMPLES = r"""
- name: A copy of today, compared with what it is of
  qmpblock.qmpblock.copy:
    address: /run/vm/web.qmp
    copies:
      vd0: "/srv/copies/web-{{ ansible_date_time.date }}.qcow2"
      vd1: "/srv/copies/data-{{ ansible_date_time.date }}.qcow2"
    verify: true
    latency: 20ms
  async: 86400
  poll: 30
"""

RETURN = r"""
planned:
  description: How it would be made, as docs/schema/plan.schema.json has it of copies.
  returned: in check mode
  type: dict
applied:
  description: What was made, as docs/schema/apply.schema.json has it of copies.
  returned: not in check mode
  type: dict
  sample: {state: done, disks: [{disk: vd0, target: /srv/copies/web.qcow2}], seconds: 1.5}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils import policies
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.command import (
    CHANGES,
    VM,
    Command,
    changing_words,
)

_CHOICES = {
    "at": ["start", "end"],
    "format": ["qcow2", "raw"],
    "layers": ["all", "top"],
    "allocation": ["thin", "full", "like"],
}


def main():
    module = AnsibleModule(
        argument_spec=dict(
            VM,
            copies={"type": "dict", "required": True},
            cluster_size={"type": "str"},
            compress={"type": "bool", "default": False},
            direct={"type": "bool", "default": False},
            reflink={"type": "bool", "default": False},
            force={"type": "bool", "default": False},
            verify={"type": "bool", "default": False},
            latency={"type": "str"},
            speed={"type": "str"},
            keep_free={"type": "str"},
            fleece={"type": "path"},
            fleece_limit={"type": "str"},
            **{name: {"type": "str", "choices": known} for name, known in _CHOICES.items()},
            **CHANGES,
        ),
        supports_check_mode=True,
    )
    wrong = policies.not_absolute(module.params["copies"], "copies")
    if wrong:
        module.fail_json(msg=wrong)
    qmpblock, words = Command(module), changing_words(module.params)
    with qmpblock.policy(policies.text(policies.of_copies(module.params))) as policy:
        if module.check_mode:
            (planned,) = qmpblock.run("plan", policy, *words).document["copies"]
            module.exit_json(changed=planned["state"] == "pending", planned=planned)
        (done,) = qmpblock.run("apply", policy, *words).document["copies"]
    module.exit_json(changed=done["state"] == "done", applied=done)


if __name__ == "__main__":
    main()
