"""What becomes of each verb by each way to reach a VM, and the test that shows it.

docs/managers.md has it as a table (`table`).

`tests/live/test_reach.py` runs every row that has words, by each way whose cell names it.
"""

from dataclasses import dataclass

#: By which a VM is reached; the last three are of managers that run it.
WAYS = ("plain QEMU", "`libvirt:DOMAIN`", "`pve:VMID`", "`incus:INSTANCE`")
PLAIN, LIBVIRT, PVE, INCUS = WAYS
#: As tests/live/test_reach.py calls them.
IDS = {LIBVIRT: "libvirt", PVE: "pve", INCUS: "incus"}

DIRECTLY, BY_LIBVIRT, REFUSED = "directly", "by libvirt", "refused"


@dataclass(frozen=True)
class Cell:
    """What becomes of a verb.

    :ivar done: directly, by libvirt, or refused.
    :ivar test: that shows it, from tests/.
    :ivar why: it is refused, in a few words.
    """

    done: str
    test: str
    why: str = ""

    def __str__(self):
        return f"{self.done}: {self.why}" if self.why else self.done


@dataclass(frozen=True)
class Row:
    """A verb.

    :ivar words: of the command, by which it is asked for of a qcow2 disk; none: it is elsewhere.
    :ivar verb: as qmpblock.managers calls it, where a manager matters.
    """

    name: str
    words: str
    cells: dict[str, Cell]
    verb: str = ""


def _here(way, test="test_each_verb"):
    return f"live/test_reach.py::{test}" + ("_by_libvirt" if way == LIBVIRT else f"[{IDS[way]}]")


def _everywhere(name, words, plain, **others):
    """Return the row of a verb that changes nothing that a manager knows."""
    cells = {PLAIN: Cell(DIRECTLY, plain)}
    cells |= {way: Cell(DIRECTLY, others.get(key) or _here(way)) for way, key in IDS.items()}
    return Row(name, words, cells)


def _owned(name, words, verb, plain, why, libvirt=""):
    """Return the row of a verb that a manager would have to know of.

    :param libvirt: the test that shows that libvirt does it; empty: it is refused there, too.
    """
    cells = {PLAIN: Cell(DIRECTLY, plain)}
    cells |= {way: Cell(REFUSED, _here(way), why) for way in IDS}
    if libvirt:
        cells[LIBVIRT] = Cell(BY_LIBVIRT, libvirt)
    return Row(name, words, cells, verb)


_SHOWS_JOBS = "live/test_commands.py::test_disks_shows_jobs_filters_and_exports"
_PULL = "live/test_libvirt_chains.py::test_a_stream_is_libvirts_own_pull_with_nothing_left_to_copy"
_RECOVERED = "live/test_job_commands.py::test_after_a_kill_the_job_is_brought_to_an_end"
_WINDOW = "the newest data is in an overlay for a while"
_CHAINS = "live/test_chains.py::test_every_chain"
_THIN = "live/test_allocate.py::test_every_chain"
_CHAIN = "its chain is the manager's"
_BESIDE = "it would not know of what is on the disk meanwhile"
_RAW = "test_host_space"

ROWS = (
    _everywhere(
        "vms",
        "",
        "live/test_vms.py::test_a_vm_of_ones_own",
        libvirt="live/test_libvirt.py::test_its_domains_are_among_the_vms_of_this_host",
        pve="live/test_proxmox.py::test_it_is_told_as_an_address",
        incus="live/test_vms.py::test_an_instance_of_incus",
    ),
    _everywhere("disks", "disks {vm}", "live/test_commands.py::test_disks_command"),
    _everywhere("map", "map {vm} {disk} --totals", "live/test_commands.py::test_map_command"),
    _everywhere("jobs", "jobs {vm}", _SHOWS_JOBS),
    _everywhere("metrics", "metrics {vm}", "live/test_metrics.py::test_they_are_what_a_map_says"),
    _everywhere(
        "recover",
        "recover {vm}",
        _RECOVERED,
    ),
    _owned(
        "snapshot",
        "snapshot {vm} {disk}={place}/overlay.qcow2",
        "snapshot",
        "live/test_snapshots.py::test_several_disks_at_one_point",
        _CHAIN,
        "live/test_libvirt_chains.py::test_a_snapshot_is_one_that_libvirt_took",
    ),
    _owned(
        "commit",
        "commit {vm} {disk}",
        "pivot",
        _CHAINS,
        _CHAIN,
        "live/test_libvirt_commit.py::test_a_commit_is_libvirts_own",
    ),
    _owned(
        "stream",
        "stream {vm} {disk}",
        "stream",
        _CHAINS,
        _CHAIN,
        _PULL,
    ),
    _owned(
        "copy --pivot",
        "copy {vm} {disk}={place}/moved.qcow2 --pivot",
        "move",
        "live/test_copy_command.py::test_the_guest_goes_over",
        _CHAIN,
        "live/test_libvirt_copy.py::test_the_guest_goes_over_and_libvirt_knows",
    ),
    _owned(
        "allocate --full of qcow2 and QED",
        "allocate {vm} {disk} --full",
        "reserve",
        "live/test_allocate_full.py::test_every_disk",
        _WINDOW,
        "live/test_libvirt_full.py::test_an_image_gets_its_host_space",
    ),
    _owned(
        "copy",
        "copy {vm} {disk}={place}/copy.qcow2",
        "copy",
        "live/test_copy.py::test_every_disk",
        _BESIDE,
    ),
    _owned(
        "backup",
        "backup {vm} {place}/backups",
        "backup",
        "live/test_backup_command.py::test_from_the_first_one_to_a_disk",
        _BESIDE,
    ),
    _owned(
        "export",
        "export {vm} {disk} -- true",
        "point",
        "live/test_export_command.py::test_a_command_reads_the_disk_as_it_was",
        _BESIDE,
    ),
    _owned(
        "migrate",
        "migrate {vm} /nosuch/destination",
        "migrate",
        "live/test_migrate.py::test_the_command",
        "there would be two of it at the next start",
    ),
    _everywhere(
        "apply of room ahead",
        "apply {ahead}",
        "live/test_ahead_policy.py::test_planned_applied_and_nothing_left_to_do",
    ),
    Row(
        "apply --watch",
        "apply {ahead} --watch",
        {
            PLAIN: Cell(
                DIRECTLY, "live/test_metrics.py::test_a_watch_tells_the_room_that_it_keeps"
            ),
            LIBVIRT: Cell(DIRECTLY, _here(LIBVIRT)),
            PVE: Cell(REFUSED, _here(PVE), "events are missed between two turns"),
            INCUS: Cell(DIRECTLY, _here(INCUS)),
        },
    ),
    _everywhere(
        "apply of thin allocation", "apply {thin}", "live/test_policy.py::test_every_scenario_twice"
    ),
    _everywhere("allocate, thin", "allocate {vm} {disk}", _THIN),
    _everywhere(
        "allocate --full of raw",
        "",
        "live/test_allocate_full.py::test_every_disk",
        libvirt="live/test_libvirt.py::test_a_raw_image_gets_its_host_space",
        pve=_here(PVE, _RAW),
        incus=_here(INCUS, _RAW),
    ),
)


def table():
    """Return the table of docs/managers.md."""
    lines = [["", *WAYS]]
    lines += [[row.name, *(str(row.cells[way]) for way in WAYS)] for row in ROWS]
    head, *rest = ("| " + " | ".join(line) + " |\n" for line in lines)
    return head.replace("|  |", "| |") + "|---" * len(lines[0]) + "|\n" + "".join(rest)
