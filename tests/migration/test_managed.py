"""A VM of libvirt's that is to be migrated: what libvirt does it by, for its disks. Real: live."""

import pytest

from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.managed import Going, virsh_migrate

SINGLE = Going("vda", "/i/d 0.raw", "raw", 1 << 20)
CHAIN = Going("vdb", "/i/d1.qcow2", "qcow2", 3 << 20, ("/i/base", "raw"))
BOTH = [SINGLE, CHAIN]


RAW = "qemu-img create -f raw '/i/d 0.raw' 1048576"
LIVE = "virsh migrate --live"


@pytest.mark.parametrize(
    ("disks", "terms", "tls", "made", "then"),
    [
        (
            *(BOTH, DiskTerms(), False, f"{RAW}; qemu-img create -f qcow2 /i/d1.qcow2 3145728"),
            f"{LIVE} --copy-storage-all --migrate-disks vda,vdb web DESTURI",
        ),
        (
            *([CHAIN], DiskTerms(layers="top"), True),
            "qemu-img create -f qcow2 -b /i/base -F raw /i/d1.qcow2 3145728",
            f"{LIVE} --copy-storage-inc --migrate-disks vdb --tls web DESTURI",
        ),
        (
            *([SINGLE], DiskTerms(layers="top"), False, RAW),
            f"{LIVE} --copy-storage-all --migrate-disks vda web DESTURI",
        ),
        (
            *([CHAIN], DiskTerms(allocation="full"), False),
            "qemu-img create -f qcow2 -o preallocation=falloc /i/d1.qcow2 3145728",
            f"{LIVE} --copy-storage-all --migrate-disks vdb web DESTURI",
        ),
    ],
)
def test_by_what_libvirt_does_it(disks, terms, tls, made, then):
    said = virsh_migrate("web", disks, terms, tls=tls)
    assert said == f"at the destination, where no file of these names is: {made}; then {then}"


@pytest.mark.parametrize(("disks", "terms"), [(BOTH, DiskTerms(copies=False)), ([], DiskTerms())])
def test_where_nothing_is_copied_nothing_is_made(disks, terms):
    assert virsh_migrate("web", disks, terms) == f"{LIVE} web DESTURI"


def test_a_domain_without_a_name_is_one():
    assert virsh_migrate("", [], DiskTerms()) == "virsh migrate --live DOMAIN DESTURI"
