"""Restoring: what is refused before anything is made."""

import pytest
from backuppoints import disk, point

from qmpblock.backups.directory import open_backups
from qmpblock.backups.restore import restore
from qmpblock.errors import NotFoundError

FIRST = point("20261130T110500Z", [disk("vd0", "a.qcow2"), disk("vd1", "b.qcow2")])
LAST = point("20261130T120500Z", [disk("vd0", "c.qcow2")])


@pytest.fixture
def place(tmp_path):
    with open_backups(tmp_path / "of web", make=True) as backups:
        for one in (FIRST, LAST):
            backups.make(one)
    return tmp_path / "of web"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "the newest backup before it that has that disk is 20261130T110500Z"),
        ({"at": LAST.when}, "the newest backup before it that has that disk is 20261130T110500Z"),
    ],
)
async def test_a_disk_that_the_backup_has_not(asked, said, place, tmp_path):
    """Which one has it is said, with the command that restores it."""
    with pytest.raises(NotFoundError) as refused:
        await restore(place, tmp_path / "new", disks=["vd0", "vd1"], **asked)
    lines = str(refused.value).splitlines()
    assert lines[:2] == ["the backup 20261130T120500Z has no disk vd1; it has:", "  vd0"]
    command = f"qmpblock restore '{place}' {tmp_path}/new --at {FIRST.when} --disk vd1"
    assert lines[-1] == f"Remedy: {said}: {command}"
    assert refused.value.exit_code == 2
    assert not (tmp_path / "new").exists()


async def test_a_disk_that_no_backup_has(place, tmp_path):
    with pytest.raises(NotFoundError) as refused:
        await restore(place, tmp_path / "new", disks=["vd9"])
    assert refused.value.remedy is None
