"""Lists of migrations are read strictly, and what each may use of the whole is told beforehand."""

import pytest

from qmpblock.errors import RequestError
from qmpblock.migration.means import MigrationMeans
from qmpblock.policy.migrations import ListedMigration, parse_migrations

ONE = "  - {source: a.qmp, destination: b.qmp}\n"
TWO = "  - {source: c.qmp, destination: d.qmp, speed: 1M, memory_only: yes, quit_source: yes}\n"
BUT = "  - {{source: a, destination: b, {}}}\n".format
DAEMON = "  - {source: c.qmp, destination: d.qmp, storage_daemon: yes}\n"


def test_a_list_is_read() -> None:
    found = parse_migrations(f"parallel: 2\nspeed: 8M\nvms:\n{ONE}{TWO}", source="f")
    assert found.parallel == 2
    assert found.migrations == (
        ListedMigration("a.qmp", "b.qmp", speed=4 << 20, place="f:4:5"),
        ListedMigration("c.qmp", "d.qmp", True, True, 1 << 20, "f:5:5"),
    )


def test_a_storage_daemon_is_asked_for_by_vm() -> None:
    found = parse_migrations(f"vms:\n{ONE}{DAEMON}").migrations
    assert [one.storage_daemon for one in found] == [False, True]


def test_a_vm_can_have_what_a_single_migration_can() -> None:
    words = "downtime_limit: 500, auto_converge: yes, write_blocking_after: 2.5, multifd: 4"
    words += ", pause_after: 30, longest_pause: 7.5"
    way = "nbds://there:10809/?tls-hostname=there.example"
    text = f"vms:\n  - {{source: a, destination: b, {words}, over: '{way}'}}\n"
    [one] = parse_migrations(text).migrations
    assert one.means == MigrationMeans(*(0.5, True, 2.5, 4), pause_after=30.0, longest_pause=7.5)
    assert one.over == way


@pytest.mark.parametrize(("parallel", "refused"), [(1, False), (2, True)])
@pytest.mark.parametrize("port", [10808, 10809, 10810])
def test_two_at_once_have_ports_of_their_own(port: int, parallel: int, refused: bool) -> None:
    lines = [
        f"  - {{source: a{n}, destination: b{n}, over: 'nbds://there:{one}'}}\n"
        for n, one in enumerate((10809, port))
    ]
    text = f"parallel: {parallel}\nvms:\n" + "".join(lines)
    if refused:
        with pytest.raises(RequestError, match="two at once need their own"):
            parse_migrations(text)
    else:
        assert len(parse_migrations(text).migrations) == 2


def test_the_active_layer_alone_is_asked_for_by_vm() -> None:
    top = "  - {source: c.qmp, destination: d.qmp, layers: top, same_backing: yes}\n"
    found = parse_migrations(f"vms:\n{ONE}{top}").migrations
    assert [(one.layers, one.same_backing) for one in found] == [("all", False), ("top", True)]


def test_host_space_is_asked_for_by_vm() -> None:
    full = "  - {source: c.qmp, destination: d.qmp, allocation: full}\n"
    found = parse_migrations(f"vms:\n{ONE}{full}").migrations
    assert [one.allocation for one in found] == ["thin", "full"]


@pytest.mark.parametrize(
    ("parallel", "speed", "each"), [(1, "8M", 8 << 20), (2, "0", 0), (9, "8M", 4 << 20)]
)
def test_the_whole_is_shared_by_those_at_once(parallel: int, speed: str, each: int) -> None:
    found = parse_migrations(f"parallel: {parallel}\nspeed: {speed}\nvms:\n{ONE}{TWO}")
    assert found.migrations[0].speed == each


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vms: []\n", "vms: is missing or empty"),
        (f"parallel: 0\nvms:\n{ONE}", "parallel: must be at least 1"),
        (f"speed: 1\nparallel: 2\nvms:\n{ONE}{TWO}", "speed: is not a byte a second"),
        (f"vms:\n{ONE}{ONE}", "vms[1].source: a.qmp stands here twice"),
        ("vms:\n  - {source: a.qmp, destination: unix:a.qmp}\n", "stands here twice"),
        ("vms:\n  - {source: a.qmp, destination: ./a.qmp}\n", "stands here twice"),
        ("vms:\n  - {source: /run/a, destination: /run/b/../a}\n", "stands here twice"),
        ("vms:\n  - {source: a.qmp}\n", "vms[0].destination: is missing"),
        ("vms:\n  - {source: a, destination: b, pivot: yes}\n", "pivot: is not a key"),
        ("vms:\n  - {source: a, destination: 'tcp:'}\n", "vms[0].destination: "),
        (f"vms:\n{BUT('downtime_limit: 0')}", "downtime_limit: must be at least 1"),
        (f"vms:\n{BUT('downtime_limit: 5001')}", "downtime_limit: a guest cannot be let stand"),
        (f"vms:\n{BUT('write_blocking_after: 0')}", "write_blocking_after: '0' is no number"),
        (f"vms:\n{BUT('write_blocking_after: 1e3')}", "write_blocking_after: '1e3' is no number"),
        (f"vms:\n{BUT('pause_after: 0')}", "pause_after: '0' is no number"),
        (f"vms:\n{BUT('longest_pause: 5')}", "longest_pause: for how long a guest may be paused"),
        (f"vms:\n{BUT('multifd: 0')}", "multifd: must be 1 to 64 channels"),
        (f"vms:\n{BUT('multifd: 65')}", "multifd: must be 1 to 64 channels"),
        (f"vms:\n{BUT('over: disk.qcow2')}", "over: disk.qcow2 is no way for a migration"),
        (f"vms:\n{BUT('over: ')}", "over: is empty"),
        (
            f"vms:\n{BUT('over: nbds://x, storage_daemon: yes')}",
            "over: does not go with storage_daemon",
        ),
        (
            f"vms:\n{BUT('memory_only: yes, storage_daemon: yes')}",
            "storage_daemon: does not go with memory_only",
        ),
        (
            f"vms:\n{BUT('memory_only: yes, write_blocking_after: 1')}",
            "write_blocking_after: does not go with memory_only",
        ),
        ("vms:\n  - {source: a, destination: b, layers: one}\n", "is not one of all, top"),
        ("vms:\n  - {source: a, destination: b, memory_only: yes, layers: top}\n", "].layers: "),
        ("vms:\n  - {source: a, destination: b, same_backing: yes}\n", "].same_backing: "),
        ("vms:\n  - {source: a, destination: b, allocation: fat}\n", "is not one of thin, full"),
        (
            "vms:\n  - {source: a, destination: b, layers: top, allocation: full}\n",
            "].allocation: an image that lies on another",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(RequestError) as failed:
        parse_migrations(text, source="f.yaml")
    assert str(failed.value).startswith("f.yaml:")
    assert said in str(failed.value)
