#!/usr/bin/python
# Copyright: The qmpblock authors
# Apache License 2.0 (see the file LICENSE of the repository)

from __future__ import annotations

DOCUMENTATION = r"""
module: disk
short_description: Have a disk of a running VM be as it is to be
description:
  - Says what a disk may depend on and where it is to have host space of its own, and has C(qmpblock apply)
    do what is missing, while the guest goes on. A disk that is as it should be is left alone.
  - An option that is not given leaves that side of the disk as it is.
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
    description: C(qmpblock plan) says what would be done, and what cannot be.
  diff_mode:
    support: full
    description: Shows, layer by layer, how many bytes it holds before and after.
notes:
  - What takes long is best begun with C(async) and C(poll). It goes on where it was when it is begun again.
options:
  disk:
    description:
      - A qdev id, QOM path, drive id, node name or the file name of the active image.
    type: str
    required: true
  backing:
    description:
      - V(independent) of any backing image, or V(keep) the chain as it is.
    type: str
    choices: [keep, independent]
  base:
    description:
      - The layer, by its node or file name, above which there is to be but one. Those between are dropped, and
        what they hold comes into the active one.
    type: str
  allocation:
    description:
      - V(thin) has what lower layers hold come into the active one; V(full) gives host space to what no
        layer holds, too.
    type: str
    choices: [as-is, thin, full]
  like:
    description:
      - A layer of the chain, or an image on the host. The disk is to have host space where that has it.
    type: str
  like_format:
    description:
      - The format of the image O(like), where the suffix of its name does not tell. It is never probed.
    type: str
  ranges:
    description:
      - Where O(allocation) or O(like) hold; by default on the whole disk.
    type: list
    elements: dict
    suboptions:
      offset:
        description: Bytes, with K, M, G or T, or a percent of the disk.
        type: str
      length:
        description: Likewise; without it, up to the disk's end.
        type: str
  speed:
    description:
      - Bytes a second (K, M, G) that are copied at most; V(0) is no limit.
    type: str
  keep_free:
    description:
      - What has to stay free on the host's file system, in bytes (K, M, G) or percent.
    type: str
  ahead:
    description:
      - Host space that is to be reserved for what the guest will write, in bytes (K, M, G) or percent of the disk.
    type: str
"""

EXAMPLES = r"""
- name: Nothing depends on the template any more, and the disk is as sparse as that
  qmpblock.qmpblock.disk:
    address: /run/vm/web.qmp
    disk: vd0
    backing: independent
    like: /srv/templates/web.qcow2
    speed: 200M
    keep_free: 10%

- name: The same of every VM of the inventory qmpblock.qmpblock.vms, and all of it has host space
  qmpblock.qmpblock.disk:
    address: "{{ qmpblock_address }}"
    disk: "{{ item.device }}"
    backing: independent
    allocation: full
  loop: "{{ qmpblock_disks }}"
  loop_control:
    label: "{{ item.device }}"
"""

RETURN = r"""
planned:
  description:
    - What was to be done when it was looked at, as docs/schema/plan.schema.json, without the pictures.
  returned: in check mode and diff mode
  type: dict
  sample: {move: 1048576, reserve: 0, leaving: [/srv/templates/web.qcow2], seconds: 0.1}
applied:
  description: What was done, as docs/schema/apply.schema.json.
  returned: not in check mode
  type: dict
  sample: {disk: vd0, state: done, allocated: 1048576, reserved: 0, dropped: [/srv/templates/web.qcow2]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.qmpblock.qmpblock.plugins.module_utils import policies
from ansible_collections.qmpblock.qmpblock.plugins.module_utils.command import (
    CHANGES,
    VM,
    Command,
    changing_words,
)

_PICTURES = ("today", "wanted")


def _only(qmpblock, verb, policy):
    """Run `plan` or `apply` on a policy of one disk; return what it says of that."""
    (disk,) = qmpblock.run(verb, policy, *changing_words(qmpblock.params)).document["disks"]
    return disk


def main():
    module = AnsibleModule(
        argument_spec=dict(
            VM,
            disk={"type": "str", "required": True},
            backing={"type": "str", "choices": ["keep", "independent"]},
            base={"type": "str"},
            allocation={"type": "str", "choices": ["as-is", "thin", "full"]},
            like={"type": "str"},
            like_format={"type": "str"},
            ranges={
                "type": "list",
                "elements": "dict",
                "options": {"offset": {"type": "str"}, "length": {"type": "str"}},
            },
            speed={"type": "str"},
            keep_free={"type": "str"},
            ahead={"type": "str"},
            **CHANGES,
        ),
        mutually_exclusive=[("backing", "base"), ("allocation", "like")],
        required_by={"like_format": ["like"]},
        supports_check_mode=True,
    )
    qmpblock = Command(module)
    result, planned, after = {}, None, None
    with qmpblock.policy(policies.text(policies.of_disk(module.params))) as policy:
        if module.check_mode or module._diff:
            planned = _only(qmpblock, "plan", policy)
            result["planned"] = {k: v for k, v in planned.items() if k not in _PICTURES}
        if module.check_mode:
            result["changed"] = policies.has_work(planned)
            after = policies.totals(planned, wanted=True)
        else:
            result["applied"] = _only(qmpblock, "apply", policy)
            result["changed"] = result["applied"]["state"] == "done"
            if module._diff:
                after = policies.totals(_only(qmpblock, "plan", policy))
    if module._diff:
        before = policies.totals(planned)
        result["diff"] = policies.difference(module.params["disk"], before, after)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
