"""How far long work is, in a file that is kept up to date."""

from pathlib import Path

import pytest

from qmpblock.allocation.room import RoomResult
from qmpblock.cli import recording as module
from qmpblock.cli.app import _COMMANDS, _group, run
from qmpblock.cli.recording import recording
from qmpblock.errors import RequestError
from qmpblock.qemu.job import Progress

#: Each command that may take hours, by words with which it would be at work.
LONG = {
    "allocate": ["/nosuch/monitor", "vd0"],
    "apply": ["{policy}"],
    "backup": ["/nosuch/monitor", "{place}"],
    "backup check": ["{place}"],
    "commit": ["/nosuch/monitor", "vd0"],
    "copy": ["/nosuch/monitor", "vd0", "{place}/copy.qcow2"],
    "export": ["/nosuch/monitor", "vd0"],
    "migrate": ["/nosuch/monitor", "/nosuch/other"],
    "recover": ["/nosuch/monitor", "--continue"],
    "restore": ["{place}", "{place}"],
    "stream": ["/nosuch/monitor", "vd0"],
    "verify": ["a.raw", "b.raw"],
}
#: All others, and why they have no figures of how far they are.
SHORT = {
    "demo": "a minute",
    "disks": "queries",
    "doctor": "looks at this host",
    "job": "a command, or two",
    "jobs": "queries",
    "map": "minutes at the most, with nothing that changes",
    "metrics": "is that itself",
    "plan": "queries and maps",
    "snapshot": "an instant",
    "vms": "queries",
}
AFTER = {"export": ["--", "true"]}


def seen(done, phase="copying"):
    return Progress("running", phase, done, 100, idle=3.0)


def lines(path):
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def test_it_is_there_from_the_beginning_and_gone_at_the_end(tmp_path):
    path, shown = tmp_path / "f.prom", []
    with recording(str(path)) as recorder:
        assert path.read_text() == ""
        show = recorder.also(shown.append, "a.qmp", "copy of vd0")
        show(seen(5))
        labels = '{type="copy",vm="a.qmp",work="copy of vd0"}'
        assert lines(path) == [
            f"qmpblock_job_done_bytes{labels} 5.0",
            f"qmpblock_job_total_bytes{labels} 100.0",
            f"qmpblock_job_seconds_since_progress{labels} 3.0",
            *lines(path)[3:],
        ]
        assert [line.split("} ")[0] + "}" for line in lines(path)[3:]] == [
            f"qmpblock_job_seconds{labels}"
        ]
        show(seen(6))  # too soon to be written
        assert lines(path)[0].endswith(" 5.0")
        show(seen(100, "ended"))
        assert lines(path)[0].endswith(" 100.0")
        recorder.forget("a.qmp", "copy of vd0")
        assert lines(path) == []
    assert [one.done for one in shown] == [5, 6, 100]
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), recording(str(tmp_path / "f")):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_several_pieces_of_work_and_rooms(tmp_path):
    path = tmp_path / "f.prom"
    with recording(str(path)) as recorder:
        recorder.also(lambda _: None, "a", "apply vd0")(seen(1))
        recorder.also(lambda _: None, "b", "apply vd0")(seen(2))
        recorder.room("a", "vd0", RoomResult("vd0", str(tmp_path), 9, 1, 4, 5))
        found = lines(path)
    assert 'qmpblock_job_done_bytes{type="apply",vm="b",work="apply vd0"} 2.0' in found
    assert 'qmpblock_room_wanted_bytes{disk="vd0",vm="a"} 9.0' in found
    assert 'qmpblock_room_bytes{disk="vd0",vm="a"} 5.0' in found
    assert sum("host_free_bytes" in line for line in found) == 1


def test_none_is_kept_where_none_is_asked_for():
    with recording(None) as recorder:
        assert recorder.also(print, "a", "b") is print
        recorder.room("a", "d", RoomResult("d", "/", 1, 0, 0, 0))
        recorder.forget("a", "b")


def test_one_that_cannot_be_written_is_refused_before_anything(tmp_path, capsys):
    with pytest.raises(RequestError, match="cannot write"), recording(str(tmp_path / "no" / "f")):
        raise AssertionError
    words = ["stream", "/nosuch/monitor", "vd0", "--metrics", str(tmp_path / "no" / "f")]
    assert run(words) == 2
    assert "cannot write" in capsys.readouterr().err


def test_one_that_cannot_be_written_later_is_told_of_once(tmp_path, capsys, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    with monkeypatch.context() as patched, recording(str(place / "f")) as recorder:
        patched.setattr(module, "_EVERY", 0.0)
        show = recorder.also(lambda _: None, "a", "copy of vd0")
        (place / "f").unlink()
        place.rmdir()
        for done in range(3):
            show(seen(done))
    assert capsys.readouterr().err.count("cannot write") == 1


def test_an_image_that_was_named_by_mistake_is_neither_written_over_nor_removed(tmp_path, capsys):
    image = tmp_path / "disk.qcow2"
    image.write_bytes(b"QFI\xfb")
    for words in (
        ["stream", "/nosuch/monitor", "vd0", "--metrics", str(image)],
        ["verify", "a.raw", "b.raw", "--metrics", str(image)],
        ["metrics", "/nosuch/monitor", "--textfile", str(image)],
    ):
        assert run(words) == 2
        assert "it exists, and holds something else" in capsys.readouterr().err
        assert image.read_bytes() == b"QFI\xfb"
    with recording(str(tmp_path / "f")):
        image.rename(tmp_path / "f")
    assert "cannot remove" in capsys.readouterr().err
    assert (tmp_path / "f").read_bytes() == b"QFI\xfb"


def test_no_long_command_is_forgotten():
    has = set()
    for name in _COMMANDS:
        command = _group.get_command(_group.make_context("qmpblock", [name]), name)
        if any("--metrics" in one.opts for one in command.params):
            has.add(name)
    assert has == {name.split()[0] for name in LONG}
    assert has | set(SHORT) == set(_COMMANDS)
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    _, _, told = page.partition("## While something of ours is at work")
    for name in LONG:
        assert f"`{name}" in told.partition("\n## ")[0], name


@pytest.mark.parametrize("name", LONG)
def test_each_long_command_refuses_a_file_that_cannot_be_written(name, tmp_path, capsys):
    """Before anything else: it has begun nothing, nor looked for its VM."""
    (tmp_path / "p.yaml").write_text(
        "vms: [{address: /nosuch/monitor, disks: [{disk: vd0, allocate: thin}]}]\n"
    )
    given = {"policy": tmp_path / "p.yaml", "place": tmp_path}
    words = [*name.split(), *(word.format(**given) for word in LONG[name])]
    code = run([*words, "--metrics", str(tmp_path / "no" / "f"), *AFTER.get(name, ())])
    err = capsys.readouterr().err
    assert (code, "cannot write" in err) == (2, True), err


@pytest.mark.parametrize(
    "words",
    [["/q"], ["/q", "--undo"], ["/q", "--continue", "--dry-run"], ["/q", "--continue", "--check"]],
)
def test_what_takes_no_time_has_none(words, capsys):
    assert run(["recover", *words, "--metrics", "f"]) == 2
    assert "--continue" in capsys.readouterr().err
    assert run(["backup", "list", ".", "--metrics", "f"]) == 2
    assert "no long work" in capsys.readouterr().err
