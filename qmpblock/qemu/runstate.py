"""States of a VM and of its migration, as data: qapi/run-state.json, qapi/migration.json. Pure."""

from __future__ import annotations

__all__ = ["MIGRATION_OVER", "OF_ITS_OWN", "STANDS", "STOPPED_ITSELF"]

#: Run states in which guest and images are this QEMU's, unless it migrates.
OF_ITS_OWN = frozenset(
    {
        "debug",
        "guest-panicked",
        "internal-error",
        "io-error",
        "paused",
        "prelaunch",
        "running",
        "shutdown",
        "suspended",
        "watchdog",
    }
)
#: Those in which the guest has stopped by itself: QEMU, or the guest, had it stop.
STOPPED_ITSELF = frozenset({"guest-panicked", "internal-error", "io-error", "shutdown", "watchdog"})
#: Those in which it does not go on by itself, or by what it waits for (`suspended`).
STANDS = OF_ITS_OWN - {"running", "suspended"}
#: States of a migration that is none, or is over.
MIGRATION_OVER = frozenset({"none", "completed", "failed", "cancelled"})
