"""This host: its files and processes, host space, and qemu-img. Nothing here speaks QMP."""
