"""Live migration: the guest goes on in another QEMU, with its disks or on shared ones.

Two VMs, one owner: the guest arrives whole, or stays as it was.

- `migrate`: one migration, its phases, and the way back from each. `job`: what whoever waits holds.
- `look`: what is asked of both VMs before anything is touched.
- `storage`: the mirrors of the source's disks, over wires that we hold.
- `stream`: QEMU's own migration, by a connection that we hold.
- `landing`: what is done to the destination.
- `arbiter`: the one object that says on which side the guest may run.
"""
