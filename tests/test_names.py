"""Names: the very ones that every version gives, read back, and told apart from others' names."""

import ast
import functools
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock import names
from qmpblock.names import LockKind

PACKAGE = Path(names.__file__).parent
RUN = "0123abcd"
VD0 = SimpleNamespace(id="vd0", qom_path="/machine/peripheral/vd0/virtio-backend")
NAMELESS = SimpleNamespace(id=None, qom_path="/machine/x")
QEMU = SimpleNamespace(uuid="00000000-0000-0000-0000-000000000001", pid=42, start=777)
OVERLAY = f"/v/d.img.qmpblock-{RUN}"

# Other versions, and other controllers, read these: they never change, by no letter.
TABLE = [
    (names.lock_name(VD0), "qmpblock-disk-vd0"),
    (names.lock_name(NAMELESS), "qmpblock-disk--71063ea614ca"),
    (names.ahead_lock_name(VD0), "qmpblock-ahead-vd0"),
    (names.ahead_lock_name(NAMELESS), "qmpblock-ahead--71063ea614ca"),
    (names.NBD_LOCK, "qmpblock-nbd"),
    (names.POLLING_LOCK, "qmpblock-polling"),
    (names.MIGRATION_LOCK, "qmpblock-migration"),
    (names.backup_lock_name(RUN), "qmpblock-backup-0123abcd"),
    (names.backups_of("qmpblock-backup-0123abcd"), RUN),
    (names.backup_bitmap(RUN, "89efcdab", 0), "qmpblock-backup-0123abcd-89efcdab-0"),
    (
        names.end_bitmap(names.backup_bitmap(RUN, "89efcdab", 0)),
        "qmpblock-backup-0123abcd-89efcdab-0-end",
    ),
    (
        names.open_bitmap(names.backup_bitmap(RUN, "89efcdab", 0)),
        "qmpblock-backup-0123abcd-89efcdab-0-open",
    ),
    (names.point_file("20261130T110500Z"), "20261130T110500Z.json"),
    (names.begun_file("20261130T110500Z"), "20261130T110500Z.begun"),
    (names.BACKUP_LOCK_FILE, ".qmpblock-backup.lock"),
    (names.handover_name(RUN), "qmpblock-0123abcd-handover"),
    (names.guard_name(RUN), "qmpblock-poll-0123abcd"),
    (names.turn_name("qmpblock-nbd", RUN), "qmpblock-nbd-undo-0123abcd"),
    (names.credentials_name(RUN), "qmpblock-0123abcd-tls"),
    (names.stream_job(RUN), "qmpblock-0123abcd-stream"),
    (names.commit_job(RUN), "qmpblock-0123abcd-commit"),
    (names.pivot_job(RUN), "qmpblock-0123abcd-pivot"),
    (names.create_job(RUN, 1), "qmpblock-0123abcd-create-1"),
    (names.filling_job(RUN), "qmpblock-0123abcd-z"),
    (names.copy_job(RUN, 2), "qmpblock-0123abcd-copy-2"),
    (names.migration_job(RUN, 2), "qmpblock-0123abcd-migrate-2"),
    (names.measuring_job(RUN), "qmpblock-0123abcd-measure"),
    (names.null_node(RUN), "qmpblock-0123abcd-null"),
    (names.stream_socket(RUN), "qmpblock-0123abcd-stream"),
    (names.target_node(RUN, 2), "qmpblock-0123abcd-to-2"),
    (names.storage_node(names.target_node(RUN, 2)), "qmpblock-0123abcd-to-2-file"),
    (names.left_bitmap(names.target_node(RUN, 2)), "qmpblock-0123abcd-to-2-left"),
    (names.written_bitmaps(names.target_node(RUN, 2))[0], "qmpblock-0123abcd-to-2-even"),
    (names.written_bitmaps(names.target_node(RUN, 2))[1], "qmpblock-0123abcd-to-2-odd"),
    (names.image_node(names.target_node(RUN, 2)), "qmpblock-0123abcd-to-2-image"),
    (names.partial_file("/v/d.img"), "/v/d.img.partial"),
    (names.overlay_node(RUN, 10), "qmpblock-0123abcd-10"),
    (names.storage_node(names.overlay_node(RUN, 0)), "qmpblock-0123abcd-0-file"),
    (
        names.filling_nodes(RUN),
        (
            "qmpblock-0123abcd-z",
            "qmpblock-0123abcd-window",
            "qmpblock-0123abcd-view",
            "qmpblock-0123abcd-filter",
            "qmpblock-0123abcd-kept",
            "qmpblock-0123abcd-kept-file",
        ),
    ),
    (names.wire_node(RUN, 2), "qmpblock-0123abcd-2-wire"),
    (names.wire_credentials(names.wire_node(RUN, 2)), "qmpblock-0123abcd-2-wire-tls"),
    (names.stream_wire(RUN), "qmpblock-0123abcd-memory-wire"),
    (names.arrival_wire(RUN), "qmpblock-0123abcd-arrival-wire"),
    (names.joint_node(RUN), "qmpblock-0123abcd-joint"),
    (
        names.joint_nodes(names.joint_node(RUN)),
        ("qmpblock-0123abcd-joint", "qmpblock-0123abcd-joint-null"),
    ),
    (
        names.holder_node(names.export_name(RUN, 3)),
        ("qmpblock-0123abcd-3-w", "qmpblock-0123abcd-3-w-j"),
    ),
    (names.joint_nodes("qmpblock-0123abcd-3-w-j")[1], "qmpblock-0123abcd-3-w-j-null"),
    (
        names.fleecing_nodes(RUN, 2),
        ("qmpblock-0123abcd-2-view", "qmpblock-0123abcd-2-filter", "qmpblock-0123abcd-2-kept"),
    ),
    (names.paused_node(RUN), "qmpblock-0123abcd-paused"),
    (names.stopped_node(RUN), "qmpblock-0123abcd-stopped"),
    (names.blocker_name(RUN), "qmpblock-0123abcd-no-migration"),
    (names.export_name(RUN, 3), "qmpblock-0123abcd-3"),
    (names.listener_name(RUN), "qmpblock-0123abcd-listen"),
    (names.helper_bitmap(RUN, "nightly"), "qmpblock-0123abcd-nightly"),
    (names.prefix_of_run(RUN), "qmpblock-0123abcd-"),
    (names.overlay_file("/v/d.img", RUN), OVERLAY),
    (names.zeros_file(OVERLAY), "/v/d.img.qmpblock-0123abcd-z"),
    (names.kept_file(OVERLAY), "/v/d.img.qmpblock-0123abcd-k"),
    (names.fleecing_file("/v/d.img", RUN, 2), "/v/d.img.qmpblock-0123abcd-fleece-2"),
    (names.journal_beside("/v/d.img", RUN), "/v/d.img.qmpblock-0123abcd.journal"),
    (names.elsewhere_beside("/v/d.img", RUN), "/v/d.img.qmpblock-0123abcd.elsewhere"),
    (
        names.journal_in_state(QEMU, ("/machine/peripheral/vd0/virtio-backend", "/x"), RUN),
        "00000000-0000-0000-0000-000000000001-42-777-3e5f4cf8-0123abcd.journal",
    ),
    (
        names.migration_in_state(QEMU, RUN),
        "00000000-0000-0000-0000-000000000001-42-777-0123abcd.migration",
    ),
    (names.socket_folder(RUN), "qmpblock-0123abcd"),
    (names.forward_folder(RUN, "monitor"), "qmpblock-0123abcd-monitor"),
    (names.forwarded_socket("/run/vm.qmp", RUN, "nbd"), "/run/qmpblock-0123abcd-nbd"),
    (names.is_forwarded("/run/qmpblock-0123abcd-nbd"), True),
    (names.is_forwarded("/run/qmpblock-0123abcd/nbd"), False),
    (names.SOCKET, "nbd"),
    (names.DEMO_FOLDER, "qmpblock-demo-"),
    (names.VM_FOLDER, "qmpblock-vm-"),
]

runs = st.text("0123456789abcdef", min_size=8, max_size=8)
ids = st.text(string.ascii_letters + string.digits + "-._", max_size=20).map("d".__add__)
devices = st.builds(
    SimpleNamespace, id=st.none() | ids, qom_path=st.text(string.printable, max_size=30)
)
numbers = st.integers(0, 10**4)
files = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=30)


def made(run, number, bitmap):
    """Return every name of a job, node, export, descriptor or bitmap of a run."""
    overlay, export = names.overlay_node(run, number), names.export_name(run, number)
    holder, joint = names.holder_node(export)
    return [
        *(names.stream_job(run), names.commit_job(run), names.pivot_job(run)),
        *(names.create_job(run, number), names.filling_job(run)),
        *(overlay, names.storage_node(overlay), *names.filling_nodes(run)),
        *(names.copy_job(run, number), names.storage_node(names.target_node(run, number))),
        *names.joint_nodes(names.joint_node(run)),
        *(export, holder, *names.joint_nodes(joint)),
        *(names.blocker_name(run), names.listener_name(run), names.credentials_name(run)),
        names.helper_bitmap(run, bitmap),
    ]


@pytest.mark.parametrize(("name", "is_what"), TABLE, ids=[str(said) for _, said in TABLE])
def test_no_name_ever_changes(name, is_what):
    assert name == is_what


def test_every_function_that_gives_a_name_is_in_the_table():
    source = Path(__file__).read_text(encoding="utf-8")
    reading = ("backup_when", "is_", "lock_kind", "lock_names", "lock_of_turn", "new_run", "run_of")
    giving = [
        name
        for name in names.__all__
        if name[0].islower() and not name.startswith(reading) and f"names.{name}(" not in source
    ]
    assert giving == []


def test_a_run_is_8_random_digits():
    assert len({names.new_run() for _ in range(100)}) == 100
    assert all(names.is_run(names.new_run()) for _ in range(100))


@pytest.mark.parametrize("text", ["", "0123abc", "0123abcde", "0123ABCD", "0123abcg", "0123abcd\n"])
def test_what_is_no_run(text):
    assert not names.is_run(text)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("0123abcd", True), ("run1", True), ("z" * 32, True), ("z" * 33, False), ("", False)]
    + [(text, False) for text in ("a-b", "A", "a/b", "a\n", "../a")],
)
def test_the_run_of_a_holder_of_whatever_version(text, is_one):
    assert names.is_holders_run(text) is is_one


@given(runs, numbers, st.text(string.ascii_letters, min_size=1, max_size=9), runs)
def test_what_a_run_makes_is_of_that_run_and_no_other(run, number, bitmap, other):
    for name in made(run, number, bitmap):
        assert names.is_ours(name)
        assert names.run_of(name) == run
        assert names.is_of_run(name, run)
        for another in (other, run[:7], f"{run}0", f"{run[:7]}x"):
            assert names.is_of_run(name, another) is (run == another)
        assert names.lock_kind(name) is None
        assert names.is_pivot(name) is (name == names.pivot_job(run) or bitmap == "pivot")
        assert names.is_create_job(name) is (name == names.create_job(run, number))
        assert not names.is_pivot(f"{name}-x")
        assert len(name.replace(bitmap, "")) <= 31 or number > 999  # QEMU's limit of node names


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qmpblock",
        "my-qmpblock-0123abcd-0",
        "#block123",
        "libvirt-1-format",
        "Qmpblock-0123abcd-0",
    ],
)
def test_what_is_nobodys_or_somebody_elses(name):
    assert not names.is_ours(name)
    assert names.run_of(name) == ""
    assert names.lock_kind(name) is None
    assert not names.is_of_run(name, RUN)


@pytest.mark.parametrize(
    "name", ["qmpblock-0123abcd", "qmpblock-0123abcd-", "qmpblock-disk-vd0", "qmpblock-x-stream"]
)
def test_ours_but_of_no_run(name):
    """Of a lock, too: who holds it says the run."""
    assert names.is_ours(name)
    assert names.run_of(name) == ""


@given(devices, runs, runs)
def test_locks_and_turns_are_told_apart(device, run, dead):
    locks = {
        names.lock_name(device): LockKind.DISK,
        names.ahead_lock_name(device): LockKind.AHEAD,
        names.guard_name(run): LockKind.GUARD,
        names.NBD_LOCK: LockKind.NBD,
        names.POLLING_LOCK: LockKind.POLLING,
        names.MIGRATION_LOCK: LockKind.MIGRATION,
        names.backup_lock_name(run): LockKind.BACKUP,
    }
    assert len(locks) == len(LockKind)
    for lock, kind in locks.items():
        assert names.is_ours(lock)
        assert names.lock_kind(lock) is kind
        assert names.run_of(lock) == ""
        turn = names.turn_name(lock, dead)
        assert names.is_turn_of(turn, lock)
        assert not names.is_turn_of(lock, lock)
        assert not names.is_turn_of(turn, f"{lock}x")
        single = kind in (LockKind.NBD, LockKind.POLLING, LockKind.MIGRATION)
        assert names.lock_kind(turn) is (None if single else kind)
        if "-undo-" not in lock:
            assert names.lock_of_turn(lock) is None
            assert names.lock_of_turn(turn) == lock
            # Whoever undoes for the dead one may die, too.
            assert names.lock_of_turn(names.turn_name(turn, run)) == turn


@given(runs, runs, runs)
def test_the_bitmaps_of_a_directory_of_backups(backups, point, other):
    bitmap = names.backup_bitmap(backups, point, 0)
    for name in (bitmap, names.end_bitmap(bitmap), names.open_bitmap(bitmap)):
        assert names.is_ours(name)
        assert names.run_of(name) == ""  # no run's: it stays
        assert names.is_backup_bitmap(name, backups)
        assert names.is_backup_bitmap(name, other) is (other == backups)
    assert not names.is_backup_bitmap(names.backup_lock_name(backups), backups)


@pytest.mark.parametrize(
    ("name", "is_of"),
    [
        ("20261130T110500Z.json", ("20261130T110500Z", True)),
        ("20261130T110500Z-2.begun", ("20261130T110500Z-2", False)),
        ("20261130T110500Z.json.partial", None),
        ("20261130T110500Z-vd0.qcow2", None),
        (".json", None),
        ("x.json", None),
        ("20261130T110500Z-a.json", None),
        ("20261130T110500Z.json/../x.json", None),
        (".x.json", None),
    ],
)
def test_what_is_a_file_about_a_backup(name, is_of):
    assert names.backup_when(name) == is_of


def test_a_disk_with_a_name_like_a_turn():
    """Such a qdev id makes its lock look like a turn; nothing but its name tells."""
    lock = names.lock_name(SimpleNamespace(id="a-undo-b", qom_path=""))
    assert names.lock_of_turn(lock) == names.lock_name(SimpleNamespace(id="a", qom_path=""))
    assert names.lock_kind(lock) is LockKind.DISK


@given(st.lists(devices, max_size=4))
def test_locks_are_taken_in_one_order(some):
    assert list(names.lock_names(some)) == sorted(map(names.lock_name, some))
    assert names.lock_names(some) == names.lock_names(some[::-1])


@given(files, runs, files)
def test_journals_beside_an_image(image, run, other):
    journal, elsewhere = names.journal_beside(image, run), names.elsewhere_beside(image, run)
    for name in (journal, elsewhere):
        assert names.run_of_journal(name) == run
        assert names.is_beside(name, image)
        assert names.is_beside(name, other) is f"{image}.".startswith(f"{other}.qmpblock-") or (
            image == other
        )
    assert names.is_elsewhere(elsewhere)
    assert not names.is_elsewhere(journal)
    overlay = names.overlay_file(image, run)
    for name in (image, overlay, names.zeros_file(overlay), names.kept_file(overlay)):
        assert not names.is_beside(name, image)


@given(
    st.builds(SimpleNamespace, uuid=st.uuids().map(str), pid=numbers, start=numbers),
    st.lists(st.text(max_size=9), min_size=1, max_size=3),
    runs,
)
def test_journals_in_the_state_directory(process, paths, run):
    name = names.journal_in_state(process, paths, run)
    assert names.run_of_journal(name) == run
    assert names.is_of_vm(name, process)
    assert not names.is_elsewhere(name)
    other = SimpleNamespace(uuid=process.uuid, pid=process.pid, start=process.start + 1)
    assert not names.is_of_vm(name, other)
    assert name != names.journal_in_state(process, [*paths, "/x"], run)
    of_migration = names.migration_in_state(process, run)
    assert names.is_migration(of_migration)
    assert not names.is_migration(name)
    assert names.run_of_journal(of_migration) == ""  # what reads the one never meets the other


@pytest.mark.parametrize(
    "name",
    [
        "",
        "key",
        "host.key",
        "d.img",
        "d.img.journal",
        f"d.img.qmpblock-{RUN}",
        f"d.img.qmpblock-{RUN}-z",
        f"d.img.qmpblock-{RUN}.journal~",
        f"d.img.qmpblock-{RUN}0.journal",
        f"qmpblock-{RUN}.txt",
        f"{RUN}.journal",
    ],
)
def test_what_is_no_journal(name):
    assert names.run_of_journal(name) == ""
    assert not names.is_beside(name, "d.img")


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        (f"/tmp/qmpblock-{RUN}/nbd", True),
        (f"/a/b c/qmpblock-{RUN}/nbd", True),
        ("/tmp/qmpblock-00000000/nbd", False),
        (f"/tmp/qmpblock-{RUN}/nbd/x", False),
        (f"/tmp/qmpblock-{RUN}/", False),
        (f"/tmp/qmpblock-{RUN}/../etc/nbd", False),
        (f"/tmp/qmpblock-{RUN}x/nbd", False),
        ("/etc/passwd", False),
        ("nbd", False),
        ("", False),
    ],
)
def test_the_socket_of_a_run(path, is_one):
    assert names.is_socket(path, RUN) is is_one


def test_the_socket_of_a_wire():
    wire = names.wire_node(RUN, 1)
    assert names.is_socket_of(f"/tmp/{wire}/nbd", wire)
    for path in (f"/tmp/{wire}/other", f"/tmp/{wire}/x/nbd", "/tmp/nbd", "", f"{wire}x/nbd"):
        assert not names.is_socket_of(path, wire)


# -- nobody else makes one, or looks into one


@functools.cache
def literals(path):
    """Return each string of a module, docstrings left out: (line, text)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documents
    ]


SIGNS = (
    *("qmpblock-", "-undo-", "-pivot", "-create-", "-no-migration"),
    *(".journal", ".elsewhere", ".begun"),
)
ALLOWED = {
    "managers.py": ("-pivot", "-create-"),  # options and commands of virsh
    "cli/copy_command.py": ("-pivot",),  # an option
    "copying/managed.py": ("-pivot",),  # one of virsh
    "testing/report.py": ("qmpblock-",),  # options of pytest
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_name_is_spelled_in_one_module(sign):
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path != Path(names.__file__)
        and sign not in ALLOWED.get(str(path.relative_to(PACKAGE)), ())
        for line, text in literals(path)
        if sign in text
    }
    assert found == set()
    assert any(sign.strip("-.") in text for _, text in literals(Path(names.__file__)))
