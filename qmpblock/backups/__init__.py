"""Backups: chains of copies over time, each of all its disks at one instant, in a directory."""
