"""Live migration with storage: two QEMUs, one guest, and at any moment one owner of it."""
