"""Which properties of devices, machines and CPUs are the guest's, and of what kind. Pure."""

from __future__ import annotations

__all__ = [
    "CPU",
    "FEATURES",
    "GUESTS_OWN",
    "HOSTS_OWN",
    "MACHINE_OPTIONS",
    "QUEUES",
    "TOPOLOGY",
    "names",
]


def names(text: str) -> frozenset[str]:
    """Return the names in a text, spaces between them."""
    return frozenset(text.split())


#: Properties of devices that are of the host. What counts of a romfile is its size, and a disk's
#: geometry is guessed from what is in the image, which is not there yet.
HOSTS_OWN = names(
    "account-failed account-invalid audiodev backend_defaults bootindex chardev cryptodev cyls"
    " discard_granularity display drive failover_pair_id head heads ioeventfd iothread"
    " iothread-vq-mapping lcyls lheads lsecs memdev netdev pcap rerror rng rombar romfile secs"
    " share-rw tpmdev werror"
)
#: Those that the guest has set itself, as registers, which go along: where its firmware has put the
#: PCI Express configuration space and the ports of the SMBus (PIIX4), and the numbers of buses.
GUESTS_OWN = names("MCFG busnr smb_io_base")
#: How many queues it has: without them the stream of a device's state does not fit.
QUEUES = names("max_ports num-queues num-request-queues num_queues ports queues vectors")
#: Features of virtio that a guest may have accepted, which a destination then has to have.
FEATURES = names(
    "any_layout config-wce csum ctrl_guest_offloads ctrl_mac_addr ctrl_rx ctrl_rx_extra ctrl_vlan"
    " ctrl_vq discard event_idx gso guest_announce guest_csum guest_ecn guest_rsc_ext guest_tso4"
    " guest_tso6 guest_ufo guest_uso4 guest_uso6 hash host_ecn host_tso4 host_tso6 host_ufo"
    " host_uso hotplug in_order indirect_desc iommu_platform mq mrg_rxbuf notify_on_empty packed"
    " param_change queue_reset report-discard-granularity rss scsi status write-zeroes"
)
#: Options of a machine that the guest can tell, where the machine has them.
MACHINE_OPTIONS = names(
    "acpi cxl default-bus-bypass-iommu fd-bootchk gic-version hmat hpet i8042 its max-ram-below-4g"
    " memory-encryption nvdimm pic pit sata secure smbios-entry-point-type smbus smm smp spcr usb"
    " virtualization vmport x-oem-id x-oem-table-id x-south-bridge"
)
#: How its CPUs are arranged: what every QEMU tells of that.
TOPOLOGY = ("cpus", "maxcpus", "sockets", "dies", "clusters", "cores", "threads")
#: What the guest finds of a CPU besides the single features.
CPU = names("family l3-cache level model model-id phys-bits stepping vendor xlevel")
