"""How the collection's modules run the command: words, answers, exit codes, its own complaints."""

import contextlib
import io
import json

import pytest
from collections_of_ansible import EndedError, FakeModule, part

from qmpblock.cli import app
from qmpblock.errors import ConnectError, Error, MonitorHeldError

command = part("module_utils.command")
runs = part("module_utils.runs")


def stderr_of(error):
    """Return what the command prints when it ends with an error."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        app._complain(str(error))
    return shown.getvalue()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, ["--json"]),
        ({"stall": 7.5, "nbd": None}, ["--json", "--stall", "7.5"]),
        (
            {"nbd": "unix:/n", "tls_creds": "/pki", "insecure": True},
            ["--json", "--nbd", "unix:/n", "--tls-creds", "/pki", "--insecure"],
        ),
    ],
)
def test_the_shared_words(params, words):
    assert command.shared_words(params) == words


def test_the_shared_words_are_all_that_the_command_has():
    context = app._group.make_context("qmpblock", ["disks", "x"])
    _, disks, _ = app._group.resolve_command(context, ["disks", "x"])
    known = {word for one in disks.params for word in one.opts if word.startswith("--")}
    every = {"stall": 1.0, "nbd": "n", "tls_creds": "t", "insecure": True}
    assert {word for word in command.shared_words(every) if word.startswith("--")} == known
    assert set(command.VM) == {"address", "executable", *every}


def test_an_answer():
    answer = command.Answer(4, '{"a": 1}', "vd0: 40%\nwarning: a bitmap counts it\n")
    assert answer.done
    assert answer.document == {"a": 1}
    assert answer.warnings == ["a bitmap counts it"]


@pytest.mark.parametrize("out", ["", "no JSON", '{"a": '])
def test_success_without_a_document_is_none(out):
    answer = command.Answer(0, out, "")
    assert not answer.done
    assert "no JSON" in answer.complaint


ERROR = Error("it broke", standing="the guest goes on", remedy="do it again")
USAGE = (
    "Usage: qmpblock map [OPTIONS]\nTry 'qmpblock map -h' for help.\n\nError: No such option: --x\n"
)


@pytest.mark.parametrize(
    ("err", "complaint"),
    [
        (stderr_of(ERROR), str(ERROR)),
        ("vd0: 3 of 4 MiB\n" + stderr_of(ERROR), str(ERROR)),
        ("qmpblock: a notice\n" + stderr_of(ERROR), str(ERROR)),
        (USAGE, "No such option: --x"),
        ("sh: qmpblock: not found\n", "sh: qmpblock: not found"),
        ("", "it said nothing"),
    ],
)
def test_the_complaint(err, complaint):
    assert command.Answer(1, "", err).complaint == complaint


def test_of_a_policy_each_disk_says_why():
    document = {
        "disks": [{"error": None}, {"error": "no room"}],
        "copies": [{"error": "it is no copy\nRemedy: move it away"}],
    }
    answer = command.Answer(1, json.dumps(document), stderr_of(ERROR))
    assert answer.complaint == "no room\nit is no copy\nRemedy: move it away"


def test_the_exit_codes_are_the_commands():
    from test_docs import EXIT_CODES

    assert {*command.OUTCOMES, *command.DONE} == EXIT_CODES


def test_it_runs_the_command_and_warns(tmp_path):
    module = FakeModule({"stall": 5.0}, [(4, "[]", "warning: look\n")], tmp_path)
    assert command.Command(module).run("disks", "/vm").document == []
    assert module.asked == [["disks", "/vm", "--json", "--stall", "5.0"]]
    assert module.environments == [runs.MARK]
    assert module.warned == ["look"]


@pytest.mark.parametrize(
    ("error", "code"), [(ERROR, 1), (ConnectError("nobody there", remedy="start it"), 3)]
)
def test_it_fails_in_the_commands_words(error, code, tmp_path):
    module = FakeModule({}, [(code, "", stderr_of(error))], tmp_path)
    with pytest.raises(EndedError) as ended:
        command.Command(module).run("disks", "/vm")
    assert ended.value.failed
    result = ended.value.result
    assert result["msg"] == f"qmpblock disks: {error}"
    assert result["rc"] == code
    assert result["outcome"] == command.OUTCOMES[code]
    assert result["cmd"] == ["/bin/qmpblock", "disks", "/vm", "--json"]
    assert result["running"] == []


def test_an_exit_code_that_nobody_knows(tmp_path):
    module = FakeModule({}, [(-9, "", "")], tmp_path)
    with pytest.raises(EndedError) as ended:
        command.Command(module).run("disks", "/vm")
    assert ended.value.result["outcome"] == "exit code -9"


def test_a_policy_is_a_file_for_as_long_as_it_is_needed(tmp_path):
    qmpblock = command.Command(module := FakeModule({}, [(0, "{}", "")], tmp_path))
    with qmpblock.policy("vms: \u20ac") as name:
        qmpblock.run("plan", name)
    assert module.policies == ["vms: \u20ac"]
    assert list(tmp_path.iterdir()) == []


HELD = MonitorHeldError("no greeting: it serves one client at a time, and that is process 7 (x)")


@pytest.fixture
def living(monkeypatch):
    """Have process 7 be a run of a playbook's, which ends when it is told to."""
    run = runs.Run(7, 1, ["qmpblock", "apply", "p.yaml"], True)
    ended = []
    monkeypatch.setattr(runs, "look", lambda pid: run if pid == 7 else None)
    monkeypatch.setattr(runs, "end", lambda found: ended.extend(found) or found)
    return ended


def test_a_run_in_the_way_is_named(living, tmp_path):
    module = FakeModule({"end_running": False}, [(3, "", stderr_of(HELD))], tmp_path)
    with pytest.raises(EndedError) as failed:
        command.Command(module).run("disks", "/vm")
    assert "process 7 (qmpblock apply p.yaml)" in failed.value.result["msg"]
    assert "end_running: true" in failed.value.result["msg"]
    assert [one["pid"] for one in failed.value.result["running"]] == [7]
    assert living == []


def test_a_run_in_the_way_is_ended_on_request(living, tmp_path):
    answers = [(3, "", stderr_of(HELD)), (0, "[]", "")]
    module = FakeModule({"end_running": True}, answers, tmp_path)
    assert command.Command(module).run("disks", "/vm").done
    assert [run.pid for run in living] == [7]
    assert "process 7" in module.warned[0]


def test_check_mode_ends_nothing(living, tmp_path):
    module = FakeModule({"end_running": True}, [(3, "", stderr_of(HELD))], tmp_path)
    module.check_mode = True
    with pytest.raises(EndedError):
        command.Command(module).run("disks", "/vm")
    assert living == []
