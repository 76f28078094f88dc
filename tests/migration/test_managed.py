"""A VM of libvirt's that is to be migrated: what libvirt does it by, for its disks. Real: live."""

import pytest

from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.managed import Going, Leaving, by_virsh

SINGLE = Going("vda", "/i/d 0.raw", "raw", 1 << 20)
CHAIN = Going("vdb", "/i/d1.qcow2", "qcow2", 3 << 20, (("/i/mid", "qcow2"), ("/i/base", "raw")))
BOTH = SINGLE, CHAIN

RAW = "qemu-img create -f raw '/i/d 0.raw' 1048576"
LIVE = "virsh migrate --live"
STAYS = f"{LIVE} --persistent --undefinesource"


def steps(disks, terms, *, name="web", stays=True, **more):
    """Return the commands that are said, by where and when they are to be run."""
    found, commands = {}, []
    for line in by_virsh(Leaving(name, tuple(disks), stays), terms, **more).splitlines():
        if line.startswith("  "):
            commands.append(line.strip())
        else:
            commands = found.setdefault(line.removesuffix(":"), [])
    return found


@pytest.mark.parametrize(
    ("disks", "terms", "tls", "made", "then"),
    [
        (
            *(BOTH, DiskTerms(), False, [RAW, "qemu-img create -f qcow2 /i/d1.qcow2 3145728"]),
            f"{STAYS} --copy-storage-all --migrate-disks vda,vdb web DESTURI",
        ),
        (
            *([CHAIN], DiskTerms(layers="top"), True),
            ["qemu-img create -f qcow2 -b /i/mid -F qcow2 /i/d1.qcow2 3145728"],
            f"{STAYS} --copy-storage-inc --migrate-disks vdb --tls web DESTURI",
        ),
        (
            *([SINGLE], DiskTerms(layers="top"), False, [RAW]),
            f"{STAYS} --copy-storage-all --migrate-disks vda web DESTURI",
        ),
        (
            *(BOTH, DiskTerms(allocation="full"), False),
            [RAW, "qemu-img create -f qcow2 -o preallocation=falloc /i/d1.qcow2 3145728"],
            f"{STAYS} --copy-storage-all --migrate-disks vda,vdb web DESTURI",
        ),
    ],
)
def test_by_what_libvirt_does_it(disks, terms, tls, made, then):
    said = steps(disks, terms, tls=tls)
    assert said["at the destination, where no file of these names is yet"] == made
    assert said["here"] == [then]


def test_what_lies_below_is_compared_before():
    first, *_ = steps(BOTH, DiskTerms(layers="top")).items()
    assert first[0].startswith("what lies below is at the destination")
    assert first[1] == [
        "qmpblock verify /i/mid THERE/i/mid --format qcow2 --second-format qcow2",
        "qmpblock verify /i/base THERE/i/base --format raw --second-format raw",
    ]


def test_how_it_is_seen_afterwards():
    said = steps(BOTH, DiskTerms())
    assert said["then there, to see it"] == ["virsh domblklist web", "qmpblock disks libvirt:web"]
    *_, closed, compared, on = said.values()
    assert closed == ["virsh save web STATE"]
    assert compared[0] == (
        "qmpblock verify '/i/d 0.raw' 'THERE/i/d 0.raw' --format raw --second-format raw"
    )
    assert on == ["virsh restore STATE --running"]


def test_host_space_for_all_is_given_afterwards():
    said = steps(BOTH, DiskTerms(allocation="full"))
    assert said["then there, for libvirt gives host space to data alone"] == [
        "qmpblock allocate libvirt:web vda --full",
        "qmpblock allocate libvirt:web vdb --full",
    ]


@pytest.mark.parametrize(("disks", "terms"), [(BOTH, DiskTerms(copies=False)), ([], DiskTerms())])
def test_where_nothing_is_copied_nothing_is_made(disks, terms):
    said = steps(disks, terms)
    assert list(said) == ["here", "then there, to see it"]
    assert said["here"] == [f"{STAYS} web DESTURI"]


def test_a_domain_that_ends_with_its_process_has_nothing_to_be_kept():
    assert steps([], DiskTerms(), stays=False)["here"] == [f"{LIVE} web DESTURI"]


def test_a_long_path_is_whole():
    long = Going("vda", f"/{'d' * 3000}", "raw", 1)
    made = steps([long], DiskTerms())["at the destination, where no file of these names is yet"]
    assert made == [f"qemu-img create -f raw {long.file} 1"]
