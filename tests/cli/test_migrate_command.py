"""What `qmpblock migrate` takes, and what it refuses before it connects."""

from __future__ import annotations

import pytest

from qmpblock.cli.app import run
from qmpblock.cli.migrate_command import _written
from qmpblock.migration.launch import Image, Launch


@pytest.mark.parametrize(
    "words",
    [
        ["vm.qmp"],
        ["vm.qmp", "--dry-run"],
        ["vm.qmp", "other.qmp", "--spawn"],
        ["vm.qmp", "other.qmp", "--command-line"],
    ],
)
def test_what_does_not_go_together(words, capsys):
    assert run(["migrate", *words]) == 2
    assert "SOURCE --spawn" in capsys.readouterr().err


def test_what_is_printed_can_be_run_by_a_shell():
    images = (
        Image("/i/a b.qcow2", "qcow2", 65536),
        Image("/i/c", "luks", 512, "key"),
        Image("/i/d", "raw", 512, preallocated=True),
    )
    text = _written(Launch(("qemu", "-m", "1G", "-S"), "/s/qmp", images))
    assert text == (
        "qemu-img create -f qcow2 '/i/a b.qcow2' 65536\n"
        "# /i/c: luks, 512 bytes, encrypted with the secret key\n"
        "qemu-img create -f raw -o preallocation=falloc /i/d 512\n"
        "qemu \\\n  -m 1G \\\n  -S\n"
    )


@pytest.mark.parametrize(
    ("way", "words", "why"),
    [
        ("nbds://there", [], "both ends need credentials"),
        ("nbd://there", [], "is without TLS"),
        ("nbd://there", ["--insecure", "--tls-creds", "/etc/pki/qemu"], "is without TLS"),
    ],
)
def test_the_way_of_a_list_is_refused_before_any_vm_is_touched(way, words, why, tmp_path, capsys):
    file = tmp_path / "list.yaml"
    file.write_text(f"vms:\n  - {{source: a, destination: b, over: '{way}'}}\n")
    assert run(["migrate", "--list", str(file), *words]) == 2
    assert why in capsys.readouterr().err
