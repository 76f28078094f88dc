"""tools/fetch_daemon.py: what becomes of packages, and of a fetch that fails.

That what it fetches runs is what tests/live/test_libvirt.py and test_migrate_ssh.py show, wherever
it is not installed.
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
