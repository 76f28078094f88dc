"""Copies of running disks: where they go, and how the guest is kept out of harm's way."""
