"""tools/fetch_qemu.py: what it reads from apt and the loader, and how the cache answers.

That it fetches QEMUs that run is what `make test` and `make matrix` show: each fetch starts
every program, and a machine, before it counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "fetch_qemu.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_qemu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_qemu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fetch_qemu = load()


def put(cache: Path, version: str, suite: str, place: str | None = None) -> Path:
    """Put a record of a QEMU into the cache, as a fetch leaves it; returns its folder."""
    folder = cache / "qemu" / (place or version)
    folder.mkdir(parents=True)
    (folder / "fetched.json").write_text(json.dumps({"version": version, "suite": suite}))
    return folder


def test_mirrors_that_call_themselves_debian_come_first_and_once() -> None:
    targets = (
        "https://vendor.example/apt/ Vendor\n"
        "http://mirror.example/debian/ Debian\n"
        "http://mirror.example/debian/ Debian\n"
        "http://mirror.example/debian-security/ Debian\n"
    )
    assert fetch_qemu.mirrors(targets) == [
        "http://mirror.example/debian/",
        "http://mirror.example/debian-security/",
        "https://vendor.example/apt/",
    ]


def test_mirrors_of_an_apt_that_never_ran_have_no_origin() -> None:
    assert fetch_qemu.mirrors("http://b.example/ \n\nhttp://a.example/ \n") == [
        "http://b.example/",
        "http://a.example/",
    ]


def test_candidate_is_read_from_the_policy() -> None:
    policy = "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:11.1.3+ds-1\n  Version table:\n"
    assert fetch_qemu.candidate(policy) == "1:11.1.3+ds-1"
    assert fetch_qemu.candidate(policy.replace("1:11.1.3+ds-1", "(none)")) is None
    assert fetch_qemu.candidate("") is None


@pytest.mark.parametrize(
    ("debian", "upstream"),
    [
        ("1:11.1.3+ds-1", "11.1.3"),
        ("1:10.0.13+ds-0+deb13u1", "10.0.13"),
        ("1:7.2+dfsg-7+deb12u18+b3", "7.2"),
        ("1:11.2.0~rc1+ds-1", "11.2.0~rc1"),
        ("1:10.0.2+ds-2~bpo12+1", "10.0.2"),
        ("11.1.3", "11.1.3"),
    ],
)
def test_upstream_version(debian: str, upstream: str) -> None:
    assert fetch_qemu.upstream_version(debian) == upstream


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(fetch_qemu.FetchError, match="cannot read the version"):
        fetch_qemu.upstream_version("../../etc")


def test_a_release_candidate_sorts_before_its_release() -> None:
    versions = ["11.1.3", "10.0.13", "11.2.0", "11.2.0~rc1", "11.10.0"]
    assert sorted(versions, key=fetch_qemu.version_key) == [
        "10.0.13",
        "11.1.3",
        "11.2.0~rc1",
        "11.2.0",
        "11.10.0",
    ]


def test_libraries_are_read_from_the_loaders_list() -> None:
    listed = (
        "\tlinux-vdso.so.1 (0x00007ffd2b5f2000)\n"
        "\tlibaio.so.1t64 => /r/usr/lib/x/libaio.so.1t64 (0x00007f1c2c000000)\n"
        "\tlibc.so.6 => /r o (t)/usr/lib/x/libc.so.6 (0x00007f1c2be00000)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f1c2c200000)\n"
    )
    assert fetch_qemu.libraries(listed) == [
        Path("/r/usr/lib/x/libaio.so.1t64"),
        Path("/r o (t)/usr/lib/x/libc.so.6"),
    ]


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(fetch_qemu.FetchError, match="lack the library libslirp"):
        fetch_qemu.libraries("\tlibslirp.so.0 => not found\n")


@pytest.mark.parametrize("by", ["path", "symlink"])
def test_a_wrapper_becomes_its_program(tmp_path: Path, by: str) -> None:
    """Its pid is the program's, its arguments arrive whole, blanks in the path do no harm."""
    folder = tmp_path / "a cache" / "11.1.3"
    (folder / "bin").mkdir(parents=True)
    (folder / "root/usr/bin").mkdir(parents=True)
    loader = folder / "root/usr/bin/ld.so"  # shows what the real one would be given
    loader.write_text('#!/bin/sh\necho "$$"\nprintf "%s\\n" "$@"\n')
    loader.chmod(0o755)
    script = folder / "bin" / "qemu-img"
    script.write_text(fetch_qemu.wrapper("qemu-img", "usr/lib/x"))
    script.chmod(0o755)
    called = script
    if by == "symlink":
        called = tmp_path / "linked"
        called.symlink_to(script)
    with subprocess.Popen(
        [called, "a b", "", "$x"], stdout=subprocess.PIPE, text=True, cwd="/"
    ) as process:
        assert process.stdout is not None
        pid, *words = process.stdout.read().split("\n")
    assert int(pid) == process.pid
    root = f"{folder}/bin/../root"
    assert words == [
        *("--library-path", f"{root}/usr/lib/x", "--argv0", str(called)),
        *(f"{root}/usr/bin/qemu-img", "a b", "", "$x", ""),
    ]


def test_the_cache_answers_without_network(tmp_path: Path) -> None:
    put(tmp_path, "11.1.2", "forky")
    newer = put(tmp_path, "11.1.10", "sid")
    old = put(tmp_path, "10.0.13", "trixie")
    for wanted, folder in (("11", newer), ("sid", newer), ("10", old), ("10.0.13", old)):
        assert fetch_qemu.fetch(tmp_path, wanted).folder == folder
    assert fetch_qemu.find(tmp_path, "1") is None
    assert fetch_qemu.find(tmp_path, "9") is None


def test_a_fetch_under_way_is_not_taken_for_a_qemu(tmp_path: Path) -> None:
    put(tmp_path, "11.1.2", "sid", ".new-abcd/sid/target")
    assert fetch_qemu.cached(tmp_path) == []


def test_what_is_neither_version_nor_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fetch_qemu.FetchError, match=r"neither a major version \(10, 11\)"):
        fetch_qemu.fetch(tmp_path, "9.2; rm")
    assert list(tmp_path.iterdir()) == []


def test_suites_that_fail_are_all_named_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(suite: str, _scratch: Path) -> None:
        raise fetch_qemu.FetchError(f"no mirror has {suite}")

    monkeypatch.setattr(fetch_qemu, "open_suite", closed)
    with pytest.raises(fetch_qemu.FetchError) as caught:
        fetch_qemu.fetch(tmp_path, "11")
    assert str(caught.value).splitlines() == [
        "forky: no mirror has forky",
        "sid: no mirror has sid",
        "experimental: no mirror has experimental",
    ]
    assert [path.name for path in (tmp_path / "qemu").iterdir()] == [".lock"]


def test_a_suite_that_has_moved_on_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moved:
        def candidate(self, _package: str) -> str:
            return "1:12.0.0+ds-1"

    monkeypatch.setattr(fetch_qemu, "open_suite", lambda *_: Moved())
    with pytest.raises(fetch_qemu.FetchError, match=r"forky: has QEMU 12\.0\.0, not 11"):
        fetch_qemu.fetch(tmp_path, "11")


def test_a_failed_command_says_what_it_said() -> None:
    with pytest.raises(fetch_qemu.FetchError, match=r"sh -c .* failed:\nwrong"):
        fetch_qemu.run(["sh", "-c", "echo wrong >&2; exit 3"])
    with pytest.raises(fetch_qemu.FetchError, match="cannot start /nowhere: No such file"):
        fetch_qemu.run(["/nowhere"])


def test_command_line(tmp_path: Path) -> None:
    folder = put(tmp_path, "11.1.2", "forky")
    qemu = folder / "bin" / "qemu-system-x86_64"
    environment = {**os.environ, "QMPBLOCK_CACHE": str(tmp_path)}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    assert call("--print-path", "11").stdout == f"{qemu}\n"
    assert call("11").stdout == f"{qemu}\n"
    assert call("--list").stdout == f"11.1.2\tforky\t{qemu}\n"
    missing = call("--print-path", "10")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "not in the cache" in missing.stderr
    assert call().returncode == 2
