"""What a disk lies on, at a backup and now: whether it can hold something else."""

from dataclasses import replace

import pytest

from qmpblock.backups.lower import ELSEWHERE, SEEN, UNSEEN, why_changed
from qmpblock.backups.point import LowerFile

MIDDLE = LowerFile("/i/middle.qcow2", "qcow2", 1 << 20, 0, SEEN, 1000, 5, 11)
BASE = LowerFile("/i/base.raw", "raw", 1 << 20, 0, SEEN, 1 << 20, 7, 12)
WAS = (MIDDLE, BASE)
HIDDEN = LowerFile("nbd://host/base", "raw", 1 << 20, 0, UNSEEN)
GONE = LowerFile("/i/base.raw", "raw", 1 << 20, 0, ELSEWHERE)
OPEN = (False, True)


@pytest.mark.parametrize("stayed_open", OPEN)
@pytest.mark.parametrize(
    ("was", "now"),
    [
        (WAS, WAS),
        ((), ()),
        (None, WAS),  # what an older version wrote
        (WAS, None),
        ([replace(one, file=f"/elsewhere/{one.file}") for one in WAS], WAS),  # a name is none
        ((HIDDEN,), (HIDDEN,)),
        ((HIDDEN,), (replace(HIDDEN, file="nbd+unix:///?socket=x"),)),
        ((HIDDEN,), (replace(BASE, size=HIDDEN.size),)),  # nobody could see what it was
    ],
)
def test_what_it_was(was, now, stayed_open):
    assert why_changed(was, now, stayed_open=stayed_open) is None


@pytest.mark.parametrize("stayed_open", OPEN)
@pytest.mark.parametrize("change", [{"length": 1}, {"modified": 6}, {"modified": 8}])
def test_a_file_that_was_written_to(change, stayed_open):
    """Whoever wrote to it while QEMU had it open, it was not for the guest."""
    why = why_changed(WAS, (MIDDLE, replace(BASE, **change)), stayed_open=stayed_open)
    assert why == "the backing image /i/base.raw was changed since the last backup"


@pytest.mark.parametrize("stayed_open", OPEN)
def test_a_file_that_was_written_to_over_one_that_cannot_be_seen(stayed_open):
    now = (replace(MIDDLE, modified=6), HIDDEN)
    why = why_changed((MIDDLE, HIDDEN), now, stayed_open=stayed_open)
    assert why == "the backing image /i/middle.qcow2 was changed since the last backup"


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (WAS, (BASE,), "the disk lies on /i/base.raw now, and lay on /i/middle.qcow2 on /i/base"),
        (WAS, (), "the disk lies on no other image now"),
        ((), WAS, "and lay on no other image at the last backup"),
        (WAS * 2, (), "and lay on 4 files at the last backup"),
        (WAS, (MIDDLE, replace(BASE, inode=13)), "/i/base.raw is another file than it was"),
        (
            WAS,
            (MIDDLE, replace(BASE, inode=13, file="/i/new.raw")),
            "the disk lies on /i/new.raw now, and lay on /i/base.raw at",
        ),
        (WAS, (MIDDLE, replace(BASE, format="qcow2")), "is opened as qcow2 of 1048576 bytes now"),
        (WAS, (MIDDLE, replace(BASE, offset=512)), "of 1048576 bytes, from byte 512 now, and"),
        (WAS, (MIDDLE, replace(BASE, size=512)), "is opened as raw of 512 bytes now"),
        (
            (HIDDEN,),
            (replace(HIDDEN, size=512),),
            "opened as raw of 512 bytes now, and was as raw",
        ),
        ((HIDDEN,), (replace(BASE, format="qcow2"),), "is opened as qcow2 of 1048576 bytes now"),
        (WAS, (MIDDLE, HIDDEN), "whether the backing image nbd://host/base was changed since"),
        (
            WAS,
            (MIDDLE, GONE),
            "the backing image /i/base.raw was replaced, renamed or removed since",
        ),
        ((MIDDLE, GONE), WAS, "/i/base.raw had been replaced, renamed or removed when the last"),
        (
            (GONE,),
            (GONE,),
            "was replaced, renamed or removed since the VM opened it, so",
        ),
        (WAS, (replace(BASE, format="luks"), MIDDLE), "the disk lies on /i/base.raw now"),
    ],
)
def test_it_may_be_another(was, now, said):
    """Unless QEMU had all of it open ever since: then it knows what it did."""
    assert said in why_changed(was, now, stayed_open=False)
    assert why_changed(was, now, stayed_open=True) is None
