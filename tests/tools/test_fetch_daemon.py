"""tools/fetch_daemon.py: what becomes of packages, and of a fetch that fails.

That what it fetches runs is what tests/live/test_libvirt.py, test_migrate_ssh.py, test_export_tools
and tests/metrics show, wherever it is not installed.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("fetch_daemon")


def test_what_lies_beside_usr_is_put_where_the_links_of_the_machine_lead(tool, tmp_path):
    (tmp_path / "lib" / "x86").mkdir(parents=True)
    (tmp_path / "lib" / "x86" / "one.so.1").write_text("1")
    (tmp_path / "lib" / "x86" / "one.so").symlink_to("one.so.1")
    (tmp_path / "usr" / "lib" / "x86").mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "x86" / "two.so").write_text("2")
    tool.merge(tmp_path)
    assert os.listdir(tmp_path) == ["usr"]
    assert sorted(os.listdir(tmp_path / "usr/lib/x86")) == ["one.so", "one.so.1", "two.so"]
    assert (tmp_path / "usr/lib/x86/one.so").readlink() == Path("one.so.1")


def test_a_failure_leaves_nothing_and_says_why(tool, tmp_path, monkeypatch, capsys):
    def fail(daemon, folder):
        raise tool.FetchError("no network")

    monkeypatch.setattr(tool, "download", fail)
    assert tool.main(["libvirt", "--cache", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "cannot have libvirt: no network" in err
    assert os.listdir(tmp_path / "libvirt") == [".lock"]


def test_packages_that_lack_the_daemon_do_not_count(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "download", lambda daemon, folder: [])
    lacking = tool.Daemon("usr/sbin/no-such-daemon", ())
    monkeypatch.setitem(tool.DAEMONS, "lacking", lacking)
    with pytest.raises(tool.FetchError, match="no-such-daemon"):
        tool.fetch(tmp_path, "lacking")
    assert not tool.place_in(tmp_path, "lacking").exists()


def test_what_is_there_is_not_fetched_again(tool, tmp_path, monkeypatch, capsys):
    place = tool.place_in(tmp_path, "libvirt")
    place.mkdir(parents=True)
    (place / "fetched.json").write_text("{}")
    monkeypatch.setattr(tool, "download", None)
    assert tool.main(["libvirt", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{place / 'root'}\n"


def test_of_a_large_package_one_program_is_taken(tool, tmp_path):
    made = tmp_path / "made"
    for name in ("usr/bin/wanted", "usr/bin/large", "DEBIAN/control"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (made / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: b\nDescription: c\n"
    )
    tool.run(["dpkg-deb", "--build", made, tmp_path / "a.deb"])
    (tmp_path / "out").mkdir()
    tool.take_out("usr/bin/wanted", [tmp_path / "a.deb"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["wanted"]
    with pytest.raises(tool.FetchError, match="usr/bin/other"):
        tool.take_out("usr/bin/other", [tmp_path / "a.deb"], tmp_path / "out")


def test_one_that_does_not_run_does_not_count(tool, tmp_path):
    program = tmp_path / "usr/bin/broken"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(tool.FetchError, match="it is broken"):
        tool.check(tool.Daemon("usr/bin/broken", (), ("--version",)), tmp_path)
