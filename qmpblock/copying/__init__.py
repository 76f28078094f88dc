"""Copies of running disks: the data moves inside QEMU, and the guest goes on.

- `options`: what a copy can be asked for. `look`: what is asked of the VM and the host before one.
- `planned`: what a copy would be, and what it takes; pure. `dryrun`: where that is found out.
- `plan`: what is to be copied where, or why it must not be; pure.
- `target`: the word for where a copy goes; pure. `targetfile`: one that is a file on this host,
  marked until it is whole. `wiretarget`: one that an NBD server exports, over a `wire`, whose
  `relay` can be cut. `devicetarget`: a block device. `targets`: which of
  them it is. `copytarget`: what a copy wants of each.
- `mirrors`: QEMU's mirror jobs of several disks, brought to one instant.
- `job`: what whoever waits for a copy holds.
- `copy`: one copy, from its plan to its last trace.
"""
