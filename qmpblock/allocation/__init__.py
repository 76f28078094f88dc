"""Bytes into the active layer, or host space for them: now, or ahead of the guest."""
