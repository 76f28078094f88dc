"""The modules of backups: the command's words, what a report tells of them, how old they are."""

import contextlib
import io
import json
from dataclasses import asdict

import pytest
from backuppoints import disk, point
from collections_of_ansible import EndedError, FakeModule, part

from qmpblock.backups.check import BackupsChecked, PointChecked
from qmpblock.backups.job import BackupResult
from qmpblock.backups.planned import PlannedBackup, PlannedDiskBackup
from qmpblock.cli import app
from qmpblock.cli.backup_command import _document
from qmpblock.cli.backupsoutput import checked_document, list_document
from qmpblock.errors import RecordError, RequestError

backups = part("module_utils.backups")

FIRST = point("20261130T110500Z", [disk("vd0", "a.qcow2"), disk("vd1", "c.qcow2")])
LAST = point("20261130T120500Z", [disk("vd0", "b.qcow2", parent="a.qcow2")])
NONE = dict.fromkeys(("kind", *backups._VALUES)) | {"disks": []} | dict.fromkeys(backups._FLAGS)
#: What both modules have to have.
GIVEN = {"address": "/vm", "directory": "/b"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, []),
        ({"disks": ["vd0", "--x"]}, ["--disk", "vd0", "--disk", "--x"]),
        ({"kind": "full"}, ["--full"]),
        ({"kind": "incremental", "verify": True}, ["--incremental", "--verify"]),
        (
            {"speed": "1M", "fleece_limit": "2G", "latency": "20ms"},
            ["--speed", "1M", "--latency", "20ms", "--fleece-limit", "2G"],
        ),
    ],
)
def test_the_words(params, words):
    assert backups.words({**NONE, **params}) == words


def test_no_option_of_a_backup_is_forgotten():
    context = app._group.make_context("qmpblock", ["backup", "x"])
    _, command, _ = app._group.resolve_command(context, ["backup", "x"])
    known = {word for one in command.params for word in one.opts if word.startswith("--")}
    shared = {"--json", "--stall", "--nbd", "--tls-creds", "--insecure", "--unmanaged"}
    every = {**dict.fromkeys(backups._VALUES, "1"), **dict.fromkeys(backups._FLAGS, True)}
    said = [
        word
        for kind in ("full", "incremental")
        for word in backups.words({**every, "disks": ["vd0"], "kind": kind})
        if word.startswith("--")
    ]
    assert {*said, *shared, "--metrics", "--dry-run"} == known


def test_what_a_report_tells():
    made = json.loads(json.dumps(_document(BackupResult("/b", FIRST, 1.0, 0.1, False, ()))))
    assert [(one["disk"], one["file"]) for one in backups.images(made)] == [
        ("vd0", "/b/a.qcow2"),
        ("vd1", "/b/c.qcow2"),
    ]
    made = _document(BackupResult("/b", LAST, 1.0, 0.1, False, ()))
    (one,) = backups.images(made)
    assert (one["kind"], one["reason"], one["length"]) == ("incremental", "", 1000)


def test_the_age_is_the_newest_ones():
    listed = list_document("/b", [FIRST, LAST])
    assert backups.age(listed["points"], LAST.moment.timestamp() + 5) == pytest.approx(5)
    assert backups.age([], 0) is None


DISK = PlannedDiskBackup(
    *("vd0", "/i/d0", "incremental", "", "b.qcow2", "/b/20261130T130500Z-vd0.qcow2", "qcow2"),
    *(5, 1, 1, None, None),
)
PLANNED = PlannedBackup("/b", False, "20261130T130500Z", "views", "so", (), (DISK,))


def planned_document():
    return json.loads(json.dumps(asdict(PLANNED)))


def test_the_difference_that_diff_mode_shows():
    points = list_document("/b", [FIRST])["points"]
    made = json.loads(json.dumps(_document(BackupResult("/b", LAST, 1.0, 0.1, False, ()))))
    found = backups.difference("/b", points, made["point"]["disks"])
    there = "a.qcow2: vd0, full: it was asked for\nc.qcow2: vd1, full: it was asked for\n"
    assert found == {
        "before_header": "/b",
        "after_header": "/b",
        "before": there,
        "after": there + "b.qcow2: vd0, on a.qcow2\n",
    }
    found = backups.difference("/b", [], backups.foreseen(planned_document()))
    assert (found["before"], found["after"]) == (
        "",
        "20261130T130500Z-vd0.qcow2: vd0, on b.qcow2\n",
    )


def ran(name, answers, place, monkeypatch, *, check_mode=False, diff=False, **given):
    """Run a module on a command that answers these; return it, and how it ended."""
    module = part(f"modules.{name}")
    made = []

    def begin(argument_spec, **_words):
        params = {key: one.get("default") for key, one in argument_spec.items()}
        made.append(FakeModule({**params, **given}, answers, place))
        made[0].check_mode, made[0]._diff = check_mode, diff
        return made[0]

    with monkeypatch.context() as patched:
        patched.setattr(module, "AnsibleModule", begin)
        with pytest.raises(EndedError) as ended:
            module.main()
    return made[0], ended.value


def failing(error):
    """Return what the command answers where it fails so."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        app._complain(str(error))
    return error.exit_code, "", shown.getvalue()


MADE = json.dumps(_document(BackupResult("/b", LAST, 1.0, 0.1, False, ())))


def test_a_backup(tmp_path, monkeypatch):
    answers = [(4, MADE, "warning: the backup of vd0 is full: look\n")]
    module, ended = ran("backup", answers, tmp_path, monkeypatch, **GIVEN, unmanaged=True)
    assert module.asked == [["backup", "/vm", "/b", "--unmanaged", "--json"]]
    assert not ended.failed
    assert ended.result["changed"]
    assert ended.result["made"] == json.loads(MADE)
    assert module.warned == ["the backup of vd0 is full: look"]


@pytest.mark.parametrize("address", ["list", "check"])
def test_a_monitor_that_is_called_as_a_word_of_the_commands(address, tmp_path, monkeypatch):
    given = {**GIVEN, "address": address}
    module, _ = ran("backup", [(0, MADE, "")], tmp_path, monkeypatch, **given)
    assert module.asked[0][:2] == ["backup", f"./{address}"]


@pytest.mark.parametrize("name", ["backup", "backup_info"])
def test_no_directory_that_nobody_has_chosen(name, tmp_path, monkeypatch):
    module, ended = ran(name, [], tmp_path, monkeypatch, address="/vm", directory="b")
    assert (ended.failed, module.asked) == (True, [])
    assert ended.result["msg"] == "directory: no absolute path: b"


@pytest.mark.parametrize("diff", [True, False])
def test_check_mode_makes_none(diff, tmp_path, monkeypatch):
    answers = [(4, json.dumps(planned_document()), "warning: it would be full\n")]
    if diff:
        answers.insert(0, (0, json.dumps(list_document("/b", [FIRST])), ""))
    given = {**GIVEN, "directory": str(tmp_path), "kind": "incremental", "end_running": True}
    module, ended = ran(
        "backup", answers, tmp_path, monkeypatch, check_mode=True, diff=diff, **given
    )
    words = ["backup", "/vm", str(tmp_path), "--incremental", "--dry-run", "--json"]
    assert module.asked == [["backup", "list", str(tmp_path), "--json"]] * diff + [words]
    assert not ended.failed
    assert ended.result["changed"]
    assert ended.result["planned"] == planned_document()
    assert module.warned == ["it would be full"]
    assert ("diff" in ended.result) is diff


def test_diff_mode_of_one_that_is_made(tmp_path, monkeypatch):
    """Into a directory that is not there, of which there is no list."""
    given = {**GIVEN, "directory": str(tmp_path / "b")}
    module, ended = ran("backup", [(0, MADE, "")], tmp_path, monkeypatch, diff=True, **given)
    assert len(module.asked) == 1
    assert ended.result["diff"]["before"] == ""
    assert ended.result["diff"]["after"] == "b.qcow2: vd0, on a.qcow2\n"


def test_what_there_is(tmp_path, monkeypatch):
    listed = list_document("/b", [FIRST, LAST])
    whole = BackupsChecked("/b", (PointChecked("1", "t", ("vd0",), ()),), (), (), 5, 1.0)
    answers = [(0, json.dumps(one), "") for one in (listed, checked_document(whole))]
    given = {"directory": "/b", "check": True}
    module, ended = ran("backup_info", answers, tmp_path, monkeypatch, **given)
    assert [words[:3] for words in module.asked] == [
        ["backup", "list", "/b"],
        ["backup", "check", "/b"],
    ]
    assert not ended.failed
    assert not ended.result["changed"]
    assert ended.result["points"] == listed["points"]
    assert ended.result["age"] > 0
    assert ended.result["checked"]["whole"]


def test_what_is_not_whole(tmp_path, monkeypatch):
    """One image is broken, and two backups with it: that is said once."""
    points = tuple(PointChecked(when, "t", ("vd0",), ("a.qcow2 is gone",)) for when in "12")
    found = BackupsChecked("/b", points, ("3.json cannot be read",), (), 0, 1.0)
    answers = [
        (0, json.dumps(list_document("/b", [FIRST])), ""),
        (1, json.dumps(checked_document(found)), "check of /b: 100%\n"),
    ]
    given = {"directory": "/b", "check": True}
    _, ended = ran("backup_info", answers, tmp_path, monkeypatch, **given)
    assert ended.failed
    assert ended.result["msg"] == "qmpblock backup: 3.json cannot be read\n1, 2: a.qcow2 is gone"
    assert ended.result["document"]["whole"] is False


@pytest.mark.parametrize(
    "error",
    [
        RequestError("there is none", remedy="name one"),
        RecordError("x.json cannot be read", standing="nothing was touched"),
    ],
)
def test_it_fails_in_the_commands_words(error, tmp_path, monkeypatch):
    _, ended = ran("backup_info", [failing(error)], tmp_path, monkeypatch, directory="/b")
    assert ended.failed
    assert ended.result["msg"] == f"qmpblock backup: {error}"
    assert ended.result["rc"] == error.exit_code
