"""snapshot, stream, commit, jobs, job and recover without a VM: requests, words, exit codes."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from drawing import RUN, chain, record
from jsonschema import Draft202012Validator

from qmpblock.chains.jobs import Outcome
from qmpblock.changes.journal import Journal
from qmpblock.cli import app, joboutput, progress
from qmpblock.cli.app import run
from qmpblock.cli.jobs_command import document
from qmpblock.cli.recording import Recorder
from qmpblock.qemu.job import Progress

NEW = ["commit", "job", "jobs", "recover", "snapshot", "stream"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))


@pytest.mark.parametrize("command", NEW)
def test_every_command_has_help_and_the_shared_options(command, capsys):
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--json", "--stall", "--nbd", "--tls-creds", "--insecure"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stream", "/q"], "DISK"),
        (["stream", "/q", "vd0", "more"], "more"),
        (["stream", "/q", "vd0", "--speed", "fast"], "is not a size"),
        (["stream", "/q", "vd0", "--speed", "-1"], "is not between"),
        (["commit", "/q", "vd0", "--throttle-guest", "x"], "is not a size"),
        (["commit", "/q", "vd0", "--stall", "nan"], "not a number of seconds"),
        (["snapshot", "/q"], "OVERLAY"),
        (["snapshot", "/q", "vd0"], "'vd0' is not DISK=OVERLAY"),
        (["snapshot", "/q", "vd0="], "is not DISK=OVERLAY"),
        (["snapshot", "/q", "=file"], "is not DISK=OVERLAY"),
        (["snapshot", "/q", "vd0=a", "vd1"], "'vd1' is not DISK=OVERLAY"),
        (["snapshot", "/q", "vd0=a", "--backing-name", "json"], "relative"),
        (["jobs"], "ADDRESS"),
        (["jobs", "tcp:nowhere"], "nowhere"),
        (["job", "/q", "j"], "pause,"),
        (["job", "/q", "j", "explode"], "explode"),
        (["job", "/q", "j", "speed"], "RATE goes with speed"),
        (["job", "/q", "j", "pause", "5M"], "RATE goes with speed"),
        (["job", "/q", "j", "speed", "fast"], "is not a size"),
        (["recover"], "ADDRESS"),
        (["recover", "/q", "--undo", "--continue"], "exclude each other"),
        (["recover", "/nosuch/a", "/nosuch/b", "/nosuch/c"], "the two of a migration"),
        (["recover", "/q", "--force", "both"], "source"),
    ],
)
def test_a_wrong_request_is_2_and_says_why(arguments, words, capsys):
    """Before anything is connected to: there is no VM at /q."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["stream", "/nosuch", "vd0"],
        ["commit", "/nosuch", "vd0", "--base", "@1"],
        ["snapshot", "/nosuch", "vd0=/i/new", "/machine/peripheral/vd1=/i/a=b"],
        ["jobs", "/nosuch"],
        ["job", "/nosuch", "j", "pause"],
        ["job", "/nosuch", "j", "speed", "0"],
        ["recover", "/nosuch"],
        ["recover", "/nosuch", "--check"],
    ],
)
def test_no_monitor_is_3(arguments, capsys):
    assert run(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Remedy:" in captured.err


def test_json_does_not_change_a_failure(capsys):
    assert run(["jobs", "/nosuch", "--json"]) == 3
    assert capsys.readouterr().out == ""


# recover IMAGE


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


def left(image, *, pivoted=False):
    """Leave the journal of an active commit that was broken off."""
    journal = Journal.create(
        record(
            operation="commit",
            pivot=True,
            top_file=str(image),
            base_file="/i/base",
            images=(str(image), "/i/base"),
        ),
        image,
    )
    if pivoted:
        journal.mark(pivoted=True)


def test_safe_images_are_0(image, capsys):
    for more in ([], ["--check"], ["--dry-run"]):
        assert run(["recover", str(image), *more]) == 0
        assert "safe" in capsys.readouterr().out


def test_check_only_tells(image, capsys):
    """0 or 4, as often as a start hook asks."""
    left(image)
    for _ in range(2):
        assert run(["recover", "--check", str(image)]) == 4
    assert run(["recover", str(image)]) == 0
    assert run(["recover", "--check", str(image)]) == 0
    assert "start the VM from" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["newer", "damaged"])
def test_what_cannot_be_read_is_never_safe(image, capsys, how):
    left(image)
    (path,) = image.parent.glob("*.journal")
    text = '{"format": 9, "version": "9.9"}\n' if how == "newer" else "damaged\n"
    path.write_text(text)
    assert run(["recover", "--check", "--json", str(image)]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert str(path) in err
    assert run(["recover", str(image)]) == 1
    assert ("9.9" if how == "newer" else "damaged") in capsys.readouterr().err
    assert path.read_text() == text


def test_what_is_not_believed_is_said(image, capsys, caplog):
    left(image)
    for path in (*image.parent.glob("*.journal"), *image.parent.glob("state/*.journal")):
        path.chmod(0o666)
    for more in ([], ["--check"]):
        assert run(["recover", str(image), *more]) == 4
        assert "is not believed: others may write to it" in caplog.text
        assert "safe" not in capsys.readouterr().out
        caplog.clear()


def test_what_is_not_proven_is_asked_about(image, capsys):
    """Another host's, of which this one has no key: a person decides."""
    left(image, pivoted=True)
    for path in image.parent.glob("state/*"):
        path.unlink()
    (copy,) = image.parent.glob("*.journal")
    before = copy.read_bytes()
    assert run(["recover", "--check", "--json", str(image)]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert "is not proven to be ours" in err
    for more in ([], ["--dry-run"]):
        assert run(["recover", str(image), *more]) == 1
        _, err = capsys.readouterr()
        for words in (str(copy), "commit of vd0", "/i/base", "--believe-journal", ".key"):
            assert words in err
    assert copy.read_bytes() == before
    assert run(["recover", "--believe-journal", str(image)]) == 4
    assert "Never use" in capsys.readouterr().out
    assert not copy.exists()
    assert run(["recover", str(image)]) == 0


def test_a_journal_is_believed_beside_an_image_alone(tmp_path, capsys):
    assert run(["recover", "--believe-journal", str(tmp_path / "qmp")]) == 2
    assert "goes with IMAGE" in capsys.readouterr().err


def test_another_image_than_before_is_4(image, capsys):
    left(image, pivoted=True)
    assert run(["recover", "--dry-run", str(image)]) == 4
    assert run(["recover", str(image)]) == 4
    assert "Never use" in capsys.readouterr().out
    assert run(["recover", str(image)]) == 0


def test_recover_prints_the_document_that_it_promises(image, capsys):
    left(image, pivoted=True)
    assert run(["recover", "--json", "--dry-run", str(image)]) == 4
    found = json.loads(capsys.readouterr().out)
    schema = Path(__file__).parents[2] / "docs" / "schema" / "recover-images.schema.json"
    Draft202012Validator(json.loads(schema.read_text())).validate(found)
    assert found[0]["run"] == RUN
    assert found[0]["stale"] == [str(image)]
    assert run(["recover", "--json", str(image)]) == 4
    capsys.readouterr()
    assert run(["recover", "--json", str(image)]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("option", ["--undo", "--continue"])
def test_of_images_nothing_can_be_carried_on(image, option, capsys):
    assert run(["recover", str(image), option]) == 2
    assert "the QEMU is gone" in capsys.readouterr().err


def test_images_and_monitors_do_not_mix(image, capsys):
    assert run(["recover", str(image), "/nosuch"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_socket_is_no_image(tmp_path, capsys):
    """It is a monitor, though nobody answers there any more."""
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert run(["recover", str(path)]) == 3
    assert "cannot connect" in capsys.readouterr().err


def test_an_image_that_is_gone_is_known_by_its_journal(image, capsys):
    left(image)
    image.unlink()
    assert run(["recover", "--check", str(image)]) == 4
    assert "start the VM from" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--check"], ["--dry-run"]])
def test_where_nothing_is_both_are_named(image, more, capsys):
    """An overlay that was removed is no monitor that does not answer."""
    image.unlink()
    assert run(["recover", str(image), *more]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert f"neither a monitor nor an image at {image}" in err
    assert "removed or renamed" in err


# what is shown


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (
            Progress("running", "copying", 16 * MIB, 64 * MIB, rate=8.0 * MIB, eta=6.2),
            "x: copying, 16M of 64M, 8M/s, 6 s to go",
        ),
        (Progress("running", "copying", 0, 0), "x: copying, 0 of 0"),
        (
            Progress("running", "copying", MIB, 2 * MIB, latency=0.0123, limit=3 * MIB),
            "x: copying, 1M of 2M, kept to 3M/s, the guest's requests take 12.3 ms",
        ),
        (
            Progress("running", "copying", MIB, 2 * MIB, limit=3 * MIB),
            "x: copying, 1M of 2M, kept to 3M/s",
        ),
        (
            Progress("ready", "ready", MIB, MIB, latency=1.0, limit=1),
            "x: ready, 0 behind the guest",
        ),
        (Progress("paused", "paused", MIB, 2 * MIB, rate=5.0 * MIB), "x: paused, 1M of 2M"),
        (Progress("ready", "ready", 3 * MIB, 4 * MIB), "x: ready, 1M behind the guest"),
        (
            Progress("ready", "converging", 3 * MIB, 4 * MIB, lagging=2),
            "x: converging, 1M behind the guest, the guest writes faster than it copies",
        ),
        (
            Progress("running", "copying", MIB, 2 * MIB, idle=7.4),
            "x: copying, 1M of 2M, has not moved for 7 s",
        ),
        (
            Progress("paused", "waiting for room", MIB, 2 * MIB),
            (
                "x: waiting for room, 1M of 2M, no space left on the device; make room, and it "
                "goes on by itself"
            ),
        ),
        (
            Progress("memory", "moving the memory", MIB, 2 * MIB, eta=1.6, downtime=0.0234),
            "x: moving the memory, 1M of 2M, 2 s to go, the guest will stand for about 0.023 s",
        ),
        (Progress("concluded", "ended", 2 * MIB, 2 * MIB), "x: ended"),
    ],
)
def test_a_line_of_progress(seen, wanted):
    assert progress.text_line("x", seen) == wanted


def test_a_hostile_name_does_not_reach_the_terminal():
    line = progress.text_line("\x1b[2J", Progress("running", "copying", 0, 0))
    assert "\x1b" not in line


def test_lines_come_when_something_changes_and_now_and_then(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.reporting("x") as show:  # pytest's stderr is no terminal
        for second in range(12):
            now = 1000.0 + second
            show(Progress("running", "copying", second, 100))
        show(Progress("paused", "paused", 12, 100))
        show(Progress("paused", "paused", 12, 100))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(",")[1].split()[0] for line in captured.err.splitlines()] == [
        "0",
        "5",
        "10",
        "12",
    ]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.reporting("stream of vd0") as show:
        show(Progress("running", "copying", 16 * MIB, 64 * MIB))
        show(Progress("ready", "ready", 0, 0))  # of nothing
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stream of vd0" in captured.err


def test_jobs_are_documented_with_their_disks():
    drawing = chain("d0", "d1").job(f"qmpblock-{RUN}-stream", "stream", "running", "d0", "d1")
    drawing.job("theirs", "create", "concluded", error="no space")
    graph = drawing.graph()
    found = [document(job, graph) for job in graph.jobs]
    schema = Path(__file__).parents[2] / "docs" / "schema" / "jobs.schema.json"
    Draft202012Validator(json.loads(schema.read_text())).validate(found)
    assert [(one["ours"], one["disks"], one["nodes"]) for one in found] == [
        (True, ["vd0"], ["d0", "d1"]),
        (False, [], []),
    ]
    assert found[1]["error"] == "no space"


# exit codes of what was done


class Disk:
    name = "vd0"


class Running:
    """A stream that ends as told."""

    type = "stream"

    def __init__(self, outcome):
        self.outcome = outcome
        self.warnings = outcome.warnings
        self.completions = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def __aiter__(self):
        for status, phase in (("running", "copying"), ("ready", "ready"), ("concluded", "ended")):
            yield Progress(status, phase, 1, 2)

    def complete(self):
        self.completions += 1


class Asked:
    json = False


@pytest.mark.parametrize(("warnings", "code"), [((), 0), (("the dirty bitmap b ends",), 4)])
async def test_a_warning_worth_acting_on_is_4(warnings, code, capsys):
    outcome = Outcome("commit", "vd0", True, "/i/base", ("/i/top",), 5, True, 1.0, warnings)
    running = Running(outcome)
    assert await joboutput.run_job(Asked, "a.qmp", Disk, running, Recorder(None)) == code
    captured = capsys.readouterr()
    assert running.completions == 1  # a pivot is due once, and nobody else asks for it
    assert "/i/top is stale from now on" in captured.out
    assert "start the VM from it" in captured.out
    assert all(f"warning: {warning}" in captured.err for warning in warnings)


async def test_nothing_to_do_is_0_and_says_so(capsys):
    outcome = Outcome("stream", "vd0", False, "/i/top")
    assert await joboutput.run_job(Asked, "a.qmp", Disk, Running(outcome), Recorder(None)) == 0
    assert "nothing to do" in capsys.readouterr().out


async def test_one_json_document_on_stdout_and_nothing_else(capsys):
    outcome = Outcome("stream", "vd0", True, "/i/top", ("/i/\x1b",), 0, False, 1.0, ("w",))
    asked, running = type("Asked", (), {"json": True}), Running(outcome)
    assert await joboutput.run_job(asked, "a.qmp", Disk, running, Recorder(None)) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left"] == ["/i/\x1b"]
    assert "\x1b" not in captured.out


@pytest.mark.parametrize("words", [("verify", "/a", "/b"), ("backup", "check", "/a")], ids=" ".join)
def test_interrupted_before_signals_are_taken_no_vm_is_spoken_of(words, monkeypatch, capsys):
    async def struck(work, *, of_vm):
        work.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_interruptible", struck)
    assert run(words) == 130
    assert capsys.readouterr().err.strip() == "qmpblock: interrupted; nothing of ours is left"


def test_interrupted_is_130(monkeypatch, capsys):
    """Before anything was begun."""
    import qmpblock.vm

    def connect(*_, **__):
        os.kill(os.getpid(), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(qmpblock.vm, "connect", connect)
    assert run(["jobs", "/q"]) == 130
    assert "interrupted" in capsys.readouterr().err
