"""Snapshot, stream and commit: what changes the chain of a disk."""
