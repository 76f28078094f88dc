"""What plan and apply say of copies."""

from qmpblock.cli import copiesoutput
from qmpblock.cli.apply_command import documents as applied
from qmpblock.cli.plan_command import documents as planned
from qmpblock.copying.job import CopyResult, DiskCopy
from qmpblock.copying.planned import PlannedCopy, PlannedDisk
from qmpblock.errors import Error
from qmpblock.policy.copies import CopiesPlan, CopiesResult
from qmpblock.policy.copyentry import CopyPolicy
from qmpblock.policy.file import DiskPolicy
from qmpblock.policy.run import DiskPlan, DiskResult

M = 1 << 20
WISH = CopyPolicy("/vm", (("vd0", "/s/a"), ("vd1", "/s/b")))
DISKS = [{"disk": "vd0", "target": "/s/a"}, {"disk": "vd1", "target": "/s/b"}]
HOW = PlannedCopy(
    "end",
    "mirrors",
    "",
    (),
    (PlannedDisk("vd0", "/i/d0", "/s/a", "raw", 16 * M, 2 * M, 3 * M, None, None),),
)
MADE = CopyResult("end", (DiskCopy("vd0", "/i/d0", "/s/a", "raw", 16 * M, M),), 1.0, 0.0123, 1, ())


def test_what_is_to_be_done():
    assert (
        copiesoutput.summary(CopiesPlan(WISH, "vd0", ("/s/a",))) == "nothing to do: /s/a is there"
    )
    there = copiesoutput.summary(CopiesPlan(WISH, "vd0", ("/s/a", "/s/b")))
    assert there == "nothing to do: /s/a, /s/b are there"
    pending = copiesoutput.summary(CopiesPlan(WISH, "vd0", planned=HOW))
    assert pending == "to be copied to /s/a: 2M to read, 3M to write"


def test_the_documents_have_disks_and_copies_apart():
    plans = [
        CopiesPlan(WISH, "vd0", ("/s/a",)),
        DiskPlan(DiskPolicy("/vm", "vd0"), "vd0"),
        CopiesPlan(WISH, "vd0", planned=HOW),
        CopiesPlan(WISH, "vd0", planned=HOW, error=Error("no")),
    ]
    told = planned(tuple(plans))
    assert [one["disk"] for one in told["disks"]] == ["vd0"]
    assert [one["state"] for one in told["copies"]] == ["there", "pending", "failed"]
    assert [one["disks"] for one in told["copies"]] == [DISKS] * 3
    assert told["copies"][1]["planned"]["disks"][0]["write"] == 3 * M
    results = [
        CopiesResult(WISH, "vd0", "done", MADE, 1.0),
        DiskResult(DiskPolicy("/vm", "vd0"), "vd0", "nothing"),
        CopiesResult(WISH, "vd0", "failed", error=Error("no")),
    ]
    told = applied(tuple(results), {})
    assert [one["state"] for one in told["disks"]] == ["nothing"]
    assert [one["state"] for one in told["copies"]] == ["done", "failed"]
    assert told["copies"][0]["made"]["disks"][0]["target"] == "/s/a"
    assert (told["copies"][1]["made"], told["copies"][1]["error"]) == (None, "no")


def test_what_was_done():
    done = CopiesResult(WISH, "vd0", "done", MADE, 1.25)
    said = copiesoutput.said_result(done)
    assert said == "copied to /s/a (16M), in 1.2 s; the guest's I/O was held for 12.3 ms"
    nothing = CopiesResult(WISH, "vd0", "nothing")
    assert copiesoutput.count([nothing]) == "1 entry of copies: 1 there already"
    many = copiesoutput.count([done, done, nothing])
    assert many == "3 entries of copies: 2 made, 1 there already"
