"""One running QEMU, over QMP: one resource of it a file."""
