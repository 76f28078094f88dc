"""States and verbs of QEMU's jobs, as data. Pure.

The rules are those of QEMU's job.c (JobSTT and JobVerbTable), in the spellings of QMP::

    created -> running -> waiting -> pending -> concluded -> (gone)
                 |  ^        ^
              paused |     ready <-> standby        (mirror, active commit)
                 +---+
    anything before concluded -> aborting -> concluded

Two rules make a controller's life bearable, and all of `qmpblock.qemu.job` rests on them:

1. A job that was started with `auto-dismiss: false` does not vanish: it stays `concluded`,
   its verdict (`error`, or none) readable, until somebody dismisses it.
2. A job that was started with `auto-finalize: false` does nothing final (drop a link,
   pivot) before somebody finalizes it in `pending`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

__all__ = ["ACTIVE", "ENDED", "GONE", "TRANSITIONS", "VERBS", "Verb", "allows", "may_follow"]

#: What may be asked of a job: the commands `job-VERB`, and `block-job-set-speed`.
Verb = Literal["pause", "resume", "set-speed", "complete", "cancel", "finalize", "dismiss"]

#: What `query-jobs` no longer lists; QMP's name of the state in events.
GONE = "null"

#: For each status, those that may come next.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "undefined": frozenset({"created"}),
    "created": frozenset({"running", "aborting", GONE}),
    "running": frozenset({"paused", "ready", "waiting", "aborting"}),
    "paused": frozenset({"running"}),
    "ready": frozenset({"standby", "waiting", "aborting"}),
    "standby": frozenset({"ready"}),
    "waiting": frozenset({"pending", "aborting"}),
    "pending": frozenset({"aborting", "concluded"}),
    "aborting": frozenset({"aborting", "concluded"}),
    "concluded": frozenset({GONE}),
    GONE: frozenset(),
}

#: Statuses in which a job works, or could; it can still be cancelled as if it never was.
ACTIVE = frozenset({"created", "running", "paused", "ready", "standby"})

#: Statuses from which a job does not come back.
ENDED = frozenset({"aborting", "concluded", GONE})

#: For each verb, the statuses in which QEMU accepts it.
VERBS: Mapping[Verb, frozenset[str]] = {
    "pause": ACTIVE,
    "resume": ACTIVE,
    "set-speed": ACTIVE,
    "complete": frozenset({"ready", "standby"}),
    "cancel": ACTIVE | {"waiting", "pending"},
    "finalize": frozenset({"pending"}),
    "dismiss": frozenset({"concluded"}),
}


def allows(status: str, verb: Verb) -> bool:
    """Whether QEMU accepts `verb` of a job in this status."""
    return status in VERBS[verb]


def may_follow(before: str, after: str) -> bool:
    """Whether a job seen as `before` may later be seen as `after`, at once or by steps.

    Between two looks a job may have gone through several states.
    """
    reached, todo = {before}, [before]
    while todo:
        for status in TRANSITIONS.get(todo.pop(), ()):
            if status not in reached:
                reached.add(status)
                todo.append(status)
    return after in reached
