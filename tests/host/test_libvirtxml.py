"""libvirt's XML: what is read of a domain's, and what it is told."""

import pytest

from qmpblock.host.libvirtxml import (
    copy_xml,
    disk_chain,
    disk_files,
    disk_targets,
    is_ready,
    snapshot_xml,
)

#: Of `virsh dumpxml`, libvirt 9.0.
XML = """\
<domain type='qemu' id='1'>
  <name>web</name>
  <devices>
    <disk type='file' device='disk'>
      <source file='/tmp/lv/img/top.qcow2' index='1'/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <alias name='sata0-0-0'/>
    </disk>
    <disk type='file' device='disk'><target dev='vdb' bus='virtio'/></disk>
  </devices>
</domain>
"""


def test_disks_by_libvirts_names():
    assert disk_targets(XML) == {"vda": "virtio-disk0", "sda": "sata0-0-0"}


@pytest.mark.parametrize("xml", ["", "<domain>", "no", "\0"])
def test_what_is_no_xml(xml):
    with pytest.raises(ValueError, match=r"."):
        disk_targets(xml)


def test_files_by_libvirts_names():
    assert disk_files(XML) == {"vda": "/tmp/lv/img/top.qcow2", "sda": "", "vdb": ""}


def test_a_snapshot_is_of_the_disks_that_are_named_alone():
    assert snapshot_xml({"vda": "/i/<&'\".qcow2"}, {"vdb", "sda"}) == (
        '<domainsnapshot><disks><disk name="vda" snapshot="external" type="file">'
        '<driver type="qcow2" /><source file="/i/&lt;&amp;\'&quot;.qcow2" /></disk>'
        '<disk name="sda" snapshot="no" /><disk name="vdb" snapshot="no" /></disks>'
        "</domainsnapshot>"
    )


def test_a_copy_is_of_a_format_that_is_said():
    assert copy_xml("/i/<&.raw", "raw") == (
        '<disk type="file"><driver name="qemu" type="raw" /><source file="/i/&lt;&amp;.raw" />'
        "</disk>"
    )


#: The active layer's index is in its source, that of what lies below beside it.
CHAIN = """\
<domain><devices><disk type='file' device='disk'>
  <source file='/i/top.qcow2' index='1'/>
  <backingStore type='file' index='4'>
    <format type='qcow2'/>
    <source file='/i/base.qcow2'/>
    <backingStore type='file'><source file='/i/raw'/><backingStore/></backingStore>
  </backingStore>
  <target dev='vda' bus='virtio'/>
</disk></devices></domain>
"""


def test_the_layers_of_a_disk_and_their_indices():
    layers = [("/i/top.qcow2", "1"), ("/i/base.qcow2", "4"), ("/i/raw", "")]
    assert disk_chain(CHAIN, "vda") == layers
    assert disk_chain(CHAIN, "vdb") == []
    assert disk_chain(XML, "sda") == []


@pytest.mark.parametrize(
    ("mirror", "ready"),
    [
        ("<mirror type='file' job='active-commit' ready='yes'/>", True),
        ("<mirror type='file' job='active-commit' ready='pivot'/>", False),  # asked already
        ("<mirror type='file' job='active-commit'/>", False),
        ("", False),
    ],
)
def test_a_job_that_waits_to_pivot(mirror, ready):
    xml = CHAIN.replace("<target", f"{mirror}<target")
    assert is_ready(xml, "vda") is ready
    assert not is_ready(xml, "vdb")
