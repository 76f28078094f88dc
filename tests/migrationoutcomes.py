"""Who has the guest when a migration was struck in a phase, and recovered: what the page says.

The page is made of this, and each cell is what a run gives (tests/live/test_migration_kills.py);
that of a wire is of a destination on another host (tests/live/test_migrate_ssh.py). Of what is
struck while the controller lives, every point of the kill matrix is held against it.
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


WIRE, WIRE_CUT = "controller; wire cut", "wire cut"  # to another host
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


EITHER = f"{SOURCE} or {DESTINATION}"  # by which command of the phase it was
_OF_IMAGES = _from(SOURCE, (Phase.HELD, EITHER), (Phase.ENDED, DESTINATION))
_OF_THE_DESTINATION = _from(SOURCE, (Phase.LANDED, EITHER), (Phase.HANDED, DESTINATION))
#: Likewise, while the controller lives: what was stopped or cut goes on when that has given up.
INTERRUPTED = {
    "storage daemon": _OF_IMAGES,
    "storage daemon hangs": _OF_IMAGES,
    # Once it has sent all, the word that the destination is to run may wait in its monitor.
    "source hangs": _from(SOURCE, (Phase.SENT, EITHER), (Phase.HANDED, DESTINATION)),
    "destination hangs": _OF_THE_DESTINATION,
    WIRE_CUT: _OF_THE_DESTINATION,
}


def allowed(struck, phase, outcome):
    """Whether the guest may be there, as the page says, where that was struck in a phase."""
    if phase is Phase.CHECKED:
        return outcome == SOURCE
    return outcome in INTERRUPTED[struck][phase].split(" or ")


def table():
    """Return the table of the page."""
    return _table(OUTCOMES)


def table_of_interrupted():
    """Return the other one."""
    return _table(INTERRUPTED)


def _table(outcomes):
    head = "| in | " + " | ".join(outcomes) + " |\n" + "|---" * (len(outcomes) + 1) + "|\n"
    return head + "".join(
        f"| `{phase.value}` | " + " | ".join(outcomes[one][phase] for one in outcomes) + " |\n"
        for phase in PHASES
    )
