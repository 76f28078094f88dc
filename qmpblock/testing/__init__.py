"""The public test harness: tiny guests on real QEMU, images from YAML, faults."""
