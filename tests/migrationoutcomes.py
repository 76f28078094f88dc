"""Who has the guest when a migration was struck in a phase, and recovered: what the page says.

The page is made of this, and each cell is what a run gives (tests/live/test_migration_kills.py);
that of a wire is of a destination on another host (tests/live/test_migrate_ssh.py).
"""

from qmpblock.migration.states import Phase

SOURCE, DESTINATION = "source", "destination"
HERE, THERE = "images of the source", "images of the destination"
ASKED = "a person decides"
PHASES = [phase for phase in Phase if phase is not Phase.CHECKED]


def _from(first, *changes):
    """Return one outcome from the first phase on, another from each phase that is named."""
    return {
        phase: [first, *(then for begin, then in changes if not phase.before(begin))][-1]
        for phase in PHASES
    }


WIRE = "controller; wire cut"
#: By what was struck, for each phase.
OUTCOMES = {
    "controller": _from(SOURCE, (Phase.HANDED, DESTINATION)),
    "controller, source": _from(HERE, (Phase.SENT, ASKED), (Phase.HANDED, DESTINATION)),
    "controller, destination": _from(SOURCE, (Phase.HANDED, ASKED)),
    "all": _from(HERE, (Phase.SENT, ASKED)),
    "controller; destination hangs": _from(SOURCE, (Phase.LANDED, ASKED)),
    WIRE: _from(SOURCE, (Phase.LANDED, ASKED)),
    "controller, storage daemon": _from(SOURCE, (Phase.HANDED, DESTINATION)),
    "source": _from(HERE, (Phase.LANDED, DESTINATION)),
}


def table():
    """Return the table of the page."""
    head = "| in | " + " | ".join(OUTCOMES) + " |\n" + "|---" * (len(OUTCOMES) + 1) + "|\n"
    return head + "".join(
        f"| `{phase.value}` | " + " | ".join(OUTCOMES[one][phase] for one in OUTCOMES) + " |\n"
        for phase in PHASES
    )
