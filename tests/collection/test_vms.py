"""The inventory: what hosts are asked, what comes of their answers."""

import json

import pytest
from collections_of_ansible import part

vms = part("module_utils.vms")

WEB = {"name": "web", "pid": 7, "manager": None, "address": "unix:/run/web.qmp", "disks": []}
DB = {**WEB, "name": "db", "pid": 8, "manager": {"name": "libvirt", "vm": "db", "told_by": "x"}}


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("hv1", ("", "hv1", "")),
        ("root@hv1", ("root", "hv1", "")),
        ("a@b@hv1:2222", ("a@b", "hv1", "2222")),
        ("[fe80::1]", ("", "fe80::1", "")),
        ("root@[fe80::1]:22", ("root", "fe80::1", "22")),
    ],
)
def test_a_host(host, found):
    assert vms.place(host) == found


def test_the_question():
    assert vms.question("localhost", ["-F", "c"], "qmpblock") == ["qmpblock", "vms", "--json"]
    assert vms.question("root@hv1:2222", ["-F", "c"], "/opt/my tools/qmpblock") == [
        *("ssh", "-o", "BatchMode=yes", "-F", "c", "-p", "2222", "-l", "root", "--", "hv1"),
        "'/opt/my tools/qmpblock' vms --json",
    ]


def test_an_answer():
    answer = json.dumps([WEB, DB]).encode()
    assert vms.read("root@hv1:22", 0, answer, b"") == {"web@hv1": WEB, "db@hv1": DB}


def test_names_that_are_not_told_apart():
    nameless = {**WEB, "name": ""}
    twins = [WEB, {**WEB, "pid": 9}, nameless]
    found = vms.read("hv1", 0, json.dumps(twins).encode(), b"")
    assert list(found) == ["web-7@hv1", "web-9@hv1", "process-7@hv1"]


def test_a_name_that_would_be_more_than_one():
    named = [{**WEB, "name": "{{ lookup('pipe', 'id') }}"}, {**WEB, "name": "a[1:3]"}]
    found = vms.read("hv1", 0, json.dumps(named).encode(), b"")
    assert list(found) == ["___lookup__pipe____id_____@hv1", "a_1_3_@hv1"]
    assert found["a_1_3_@hv1"]["name"] == "a[1:3]"


@pytest.mark.parametrize(
    ("code", "out", "err", "said"),
    [
        (255, b"", b"ssh: no route\n", "exit code 255: ssh: no route"),
        (127, b"", b"", "exit code 127: it said nothing"),
        (0, b"no JSON", b"", "did not answer"),
        (0, b'{"name": "x"}', b"", "did not answer"),
        (0, b"[{}]", b"", "did not answer"),
        (0, b"[3]", b"", "did not answer"),
    ],
)
def test_no_answer(code, out, err, said):
    with pytest.raises(vms.HostError, match=said):
        vms.read("hv1", code, out, err)


def test_the_variables():
    assert vms.variables("localhost", WEB, ["-F", "c"]) == {
        "qmpblock_host": "localhost",
        "ansible_connection": "local",
        **{f"qmpblock_{key}": value for key, value in WEB.items()},
    }
    found = vms.variables("root@hv1:2222", WEB, ["-F", "a b"])
    assert found["qmpblock_address"] == "unix:/run/web.qmp"
    assert {k: v for k, v in found.items() if k.startswith("ansible_")} == {
        "ansible_host": "hv1",
        "ansible_user": "root",
        "ansible_port": 2222,
        "ansible_ssh_extra_args": "-F 'a b'",
    }


def test_the_groups():
    assert vms.groups_of("root@hv-1.example", WEB)[1:] == ["on_hv_1_example", "unmanaged"]
    assert vms.groups_of("localhost", DB) == ["qmpblock_vms", "on_localhost", "managed_by_libvirt"]
