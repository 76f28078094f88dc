"""What a policy says of copies."""

from dataclasses import fields

import pytest

from qmpblock.copying.options import CopyOptions
from qmpblock.policy.copyentry import NOT_IN_POLICIES, OPTIONS, CopyPolicy
from qmpblock.policy.file import PolicyError, parse_policy
from qmpblock.sizes import Amount

TOP = "speed: 4M\nkeep_free: 1M\nvms:\n- address: /vm\n"


def copies(text):
    return parse_policy(TOP + text, source="p").copies


def test_every_option_is_one_of_a_policy_or_said_to_be_none():
    assert OPTIONS.keys() | NOT_IN_POLICIES == {one.name for one in fields(CopyOptions)}
    assert not OPTIONS.keys() & NOT_IN_POLICIES


def test_the_short_form():
    [one] = copies("  copies: {vd0: /s/a.qcow2, vd1: b.raw}\n")
    wanted = CopyPolicy(
        "/vm",
        (("vd0", "/s/a.qcow2"), ("vd1", "b.raw")),
        CopyOptions(speed=4 << 20),
        Amount(1 << 20),
        0,
        "p:5:11",
    )
    assert one == wanted
    assert (one.disk, one.wanted) == ("vd0, vd1", "copies in /s/a.qcow2, b.raw")


def test_options():
    entry = (
        "  copies:\n  - disks: {vd0: a}\n    at: start\n    format: qcow2\n    layers: top\n"
        "    allocation: thin\n    cluster_size: 128K\n    compress: yes\n"
        "    direct: yes\n    reflink: no\n"
        "    force: yes\n    verify: true\n    fleece: /f\n    fleece_limit: 1G\n"
        "    latency: 20ms\n    speed: 0\n    keep_free: 5%\n    order: -2\n"
    )
    [one] = copies(entry)
    assert one.options == CopyOptions(
        at="start",
        format="qcow2",
        layers="top",
        cluster_size=128 << 10,
        compress=True,
        direct=True,
        force=True,
        verify=True,
        fleece="/f",
        fleece_limit=1 << 30,
        latency=0.02,
    )
    assert (one.speed, one.order, one.keep_free) == (0, -2, Amount(percent=5))
    for key in OPTIONS:
        assert f"    {key}: " in entry


def test_the_order_of_disks_and_copies():
    policy = parse_policy(
        "vms:\n- address: a\n  disks: [{disk: d, order: 1}, {disk: e}]\n"
        "  copies: [{disks: {d: x}}, {disks: {d: y}, order: -1}]\n"
        "- address: b\n  copies: {f: z}\n"
    )
    assert [one.disk for one in policy.disks] == ["e", "d"]
    assert [one.targets[0][1] for one in policy.copies] == ["y", "x", "z"]
    said = [getattr(one, "targets", one.disk) for one in policy.wishes]
    assert said == [(("d", "y"),), "e", (("d", "x"),), (("f", "z"),), "d"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  copies: {}\n", "p:5:11: vms[0].copies: names no disk"),
        ("  copies: []\n", "copies: is missing or empty"),
        ("  copies: {vd0: ''}\n", "p:5:17: vms[0].copies.vd0: is empty"),
        ("  copies: {vd0: [a]}\n", "must be one value"),
        ("  copies: {vd0: nbd://h/x}\n", "p:5:17: vms[0].copies.vd0: nbd://h/x is a server's"),
        ("  copies: {vd0: http://h/x}\n", "vms[0].copies.vd0: "),
        ("  copies: {vd0: a, vd1: ./a}\n", "p:5:25: vms[0].copies.vd1: ./a is a target already: p"),
        ("  copies: [{disks: {d: a}}, {disks: {e: a}}]\n", "a is a target already: p:5:20"),
        ("  copies: [{at: end}]\n", "disks: is missing"),
        ("  copies: [{disks: {d: a}, at: noon}]\n", "p:5:32: vms[0].copies[0].at: 'noon' is not"),
        ("  copies: [{disks: {d: a}, pivot: yes}]\n", "pivot: is not a key that is known here"),
        ("  copies: [{disks: {d: a}, latency: soon}]\n", "latency: 'soon' is not a time"),
        ("  copies: [{disks: {d: a}, fleece_limit: x}]\n", "fleece_limit: 'x' is not a size"),
        ("  copies: [{disks: {d: a}, format: vmdk}]\n", "'vmdk' is not one of qcow2, raw"),
        ("  copies: [{disks: {d: a}, at: end, verify: yes}]\n", "verify: goes with `at: start`"),
        ("  copies: [{disks: {d: a}, layers: top, format: raw}]\n", "format: is raw, which"),
        ("  copies: [{disks: {d: a}, force: maybe}]\n", "'maybe' is neither yes nor no"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, said):
    with pytest.raises(PolicyError) as refused:
        copies(text)
    assert str(refused.value).startswith("p:5:")
    assert said in str(refused.value)


def test_a_vm_without_either():
    with pytest.raises(PolicyError, match="disks: is missing"):
        parse_policy(TOP)
