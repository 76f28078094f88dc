"""What is said of a migration that is not made: by which network it would go."""

from __future__ import annotations

from qmpblock.cli.plannedmigration import document, said
from qmpblock.migration.predict import Prediction, WireSpeed
from qmpblock.migration.rehearsal import PlannedMigration

WAY = "nbds://10.0.0.2:10809"
PLANNED = PlannedMigration(
    (), wire=WireSpeed(100 << 20, 0.0002), prediction=Prediction(True, "it ends", 1024.0)
)


def test_what_was_measured_is_said_of_the_network_that_it_was_measured_of() -> None:
    [line] = [one for one in said(PLANNED) if one.startswith("wire")]
    assert line == "wire: 100M/s, 0.2 ms there and back (measured)"
    over = PlannedMigration((), over=WAY, wire=PLANNED.wire, prediction=PLANNED.prediction)
    [line] = [one for one in said(over) if one.startswith("wire")]
    assert line == f"wire by {WAY}: 100M/s, 0.2 ms there and back (measured)"
    assert (document(PLANNED)["over"], document(over)["over"]) == (None, WAY)
