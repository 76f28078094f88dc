"""Policies are read strictly: what is wrong is told with its place, before any VM is touched."""

import contextlib
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.cli.app import run
from qmpblock.policy.file import DiskPolicy, Part, PolicyError, load_policy, parse_policy
from qmpblock.sizes import Amount

WHOLE = """
parallel: 3
speed: 100M
keep_free: 10%
vms:
  - address: /run/a.qmp
    disks:
      - disk: vd0
        backing: independent
        allocation: full
        order: 2
      - disk: vd1
        backing: {base: master.qcow2}
        allocation: thin
        ranges:
          - {length: 1G}
          - {offset: 50%, length: 12.5%}
          - {offset: 90%}
        speed: 0
        keep_free: 5G
        ahead: 256M
  - address: tcp:host:4444
    disks:
      - disk: off
        allocation: {like: /srv/master.img, format: raw}
        order: -1
"""


def parse(text):
    return parse_policy(text, source="p.yaml")


def test_everything_that_can_be_said():
    policy = parse(WHOLE)
    assert policy.parallel == 3
    ten = Amount(percent=Fraction(10))
    assert policy.disks == (
        DiskPolicy(
            "tcp:host:4444",
            "off",  # no implicit types: not a boolean
            allocation="like",
            like="/srv/master.img",
            like_format="raw",
            speed=100 << 20,
            keep_free=ten,
            order=-1,
            place="p.yaml:24:9",
        ),
        DiskPolicy(
            "/run/a.qmp",
            "vd1",
            base="master.qcow2",
            allocation="thin",
            parts=(
                Part(Amount(), Amount(1 << 30)),
                Part(Amount(percent=Fraction(50)), Amount(percent=Fraction(25, 2))),
                Part(Amount(percent=Fraction(90)), None),
            ),
            speed=0,
            keep_free=Amount(5 << 30),
            ahead=Amount(256 << 20),
            place="p.yaml:12:9",
        ),
        DiskPolicy(
            "/run/a.qmp",
            "vd0",
            independent=True,
            allocation="full",
            speed=100 << 20,
            keep_free=ten,
            order=2,
            place="p.yaml:8:9",
        ),
    )


def test_what_is_not_said_is_left_as_it_is():
    [disk] = parse("vms: [{address: a, disks: [{disk: vd0}]}]").disks
    assert (disk.backing, disk.allocation) == ("keep", "as-is")
    assert (disk.speed, disk.keep_free, disk.ahead, disk.parts) == (0, None, None, ())


def disk(text):
    return f"vms:\n- address: a\n  disks:\n  - {{disk: d, {text}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yaml:1:1: is empty"),
        ("vms: [", "p.yaml:2:1: is not YAML: "),
        ("vms: [}", "p.yaml:1:7: is not YAML: "),
        ("a: *b", "p.yaml:1:4: is not YAML: found undefined alias"),
        ("- a", "p.yaml:1:1: must be a mapping"),
        ("parallel: 2", "p.yaml:1:1: vms: is missing or empty"),
        ("vms: []", "p.yaml:1:6: vms: is missing or empty"),
        ("vms: 5", "p.yaml:1:6: vms: must be a list"),
        ("vms:\n- address: a", "p.yaml:2:3: vms[0].disks: is missing or empty"),
        ("vms:\n- disks: [{disk: d}]", "p.yaml:2:3: vms[0].address: is missing"),
        ("parallel: 0\nvms: []", "p.yaml:1:11: parallel: must be at least 1"),
        ("parallel: two\nvms: []", "p.yaml:1:11: parallel: 'two' is not a whole number"),
        ("speed: fast\nvms: []", "p.yaml:1:8: speed: 'fast' is not a size"),
        ("speed: 9999999999T\nvms: []", "p.yaml:1:8: speed: is more than 2^63 - 1"),
        ("keep_free: 101%\nvms: []", "p.yaml:1:12: keep_free: '101%' is more than the whole"),
        ("keep_free: -1\nvms: []", "p.yaml:1:12: keep_free: '-1' is neither a size"),
        ("vms:\n- address: 'h:0'\n  disks: []", "p.yaml:2:12: vms[0].address: the port in"),
        ("vms:\n- address: ''\n  disks: []", "p.yaml:2:12: vms[0].address: is empty"),
        (
            "vms:\n- address: libvirt:xen:///?a\n  disks: []",
            "p.yaml:2:12: vms[0].address: 'xen:///' is not",
        ),
        (disk("colour: red"), "p.yaml:4:15: vms[0].disks[0].colour: is not a key"),
        (disk("disk: e"), "p.yaml:4:15: vms[0].disks[0].disk: stands here twice"),
        (disk("backing: gone"), "p.yaml:4:24: vms[0].disks[0].backing: 'gone' is not one of keep"),
        (disk("backing: [keep]"), "p.yaml:4:24: vms[0].disks[0].backing: must be one value"),
        (disk("backing: {}"), "p.yaml:4:24: vms[0].disks[0].backing.base: is missing"),
        (
            disk("backing: {base: '@1'}"),
            "p.yaml:4:31: vms[0].disks[0].backing.base: @1 is a depth, which changes",
        ),
        (disk("backing: {base: a, top: b}"), "p.yaml:4:34: vms[0].disks[0].backing.top: is not"),
        (disk("allocation: fat"), "p.yaml:4:27: vms[0].disks[0].allocation: 'fat' is not one of"),
        (disk("allocation: like"), "'like' is not one of as-is, thin, full"),
        (disk("allocation: {like: '@1'}"), "allocation.like: @1 is a depth"),
        (disk("ahead: 0"), "p.yaml:4:22: vms[0].disks[0].ahead: is nothing"),
        (disk("ahead: 0%"), "p.yaml:4:22: vms[0].disks[0].ahead: is nothing"),
        (disk("ahead: much"), "p.yaml:4:22: vms[0].disks[0].ahead: 'much' is neither a size"),
        (disk("ahead: 101%"), "p.yaml:4:22: vms[0].disks[0].ahead: '101%' is more than"),
        (f"ahead: 1G\n{disk('order: 0')}", "p.yaml:1:1: ahead: is not a key that is known here"),
        (disk("ranges: [{}]"), "p.yaml:4:23: vms[0].disks[0].ranges: say where to allocate"),
        (
            disk("allocation: thin, backing: independent, ranges: [{}]"),
            "p.yaml:4:63: vms[0].disks[0].ranges: a disk becomes independent whole",
        ),
        (disk("allocation: full, ranges: []"), "ranges: is missing or empty"),
        (disk("allocation: full, ranges: [1M]"), "ranges[0]: must be a mapping"),
        (disk("allocation: full, ranges: [{length: 0}]"), "ranges[0].length: is nothing"),
        (disk("allocation: full, ranges: [{length: 0%}]"), "ranges[0].length: is nothing"),
        (
            disk("allocation: full, ranges: [{offset: 60%, length: 50%}]"),
            "ranges[0].length: reaches past the end",
        ),
        (disk("order: 1.5"), "p.yaml:4:22: vms[0].disks[0].order: '1.5' is not a whole number"),
        (
            "vms:\n- {address: a, disks: [{disk: d}]}\n- {address: 'unix:a', disks: [{disk: d}]}",
            "p.yaml:3:38: vms[1].disks[0].disk: d of this VM stands here twice",
        ),
    ],
)
def test_errors_name_file_line_column_and_key(text, message):
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@settings(max_examples=300)
@given(
    st.text(max_size=200)
    | st.text(alphabet="backingloctnvmsdr:{}[]- \n.,01M%@&*!", max_size=200).map(
        lambda text: disk("order: 1") + "\n    " + text
    )
)
def test_any_text_is_a_policy_or_a_policy_error(text):
    with contextlib.suppress(PolicyError):  # anything else is a failure
        assert parse(text).disks


def test_a_deeply_nested_text_is_an_error():
    with pytest.raises(PolicyError):
        parse("vms: " + "[" * 5000)


def test_files_that_cannot_be_read(tmp_path, capsys):
    with pytest.raises(PolicyError, match="cannot read"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="cannot read"):
        load_policy(tmp_path / "latin.yaml")


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_wrong_policy_is_2_and_says_where(command, tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(disk("backing: gone"))
    assert run([command, str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{path}:4:24: vms[0].disks[0].backing" in captured.err


def test_the_example_of_the_reference_is_a_policy():
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text("utf-8")
    [shown] = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    policy = parse(shown)
    assert [(one.disk, one.backing, one.allocation) for one in policy.disks] == [
        ("vd1", "keep", "full"),
        ("vd0", "independent", "like"),
        ("vd0", "base base.qcow2", "as-is"),
    ]


def test_the_reference_has_every_key():
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text("utf-8")
    described = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    for text in ("x: 1", disk("x: 1")):
        with pytest.raises(PolicyError) as caught:
            parse(
                f"{text}\nvms: [{{address: a, disks: [{{disk: d}}]}}]" if text == "x: 1" else text
            )
        known = re.search(r"known here \((.*)\)", str(caught.value))
        assert set(known[1].split(", ")) - {"address", "disks"} <= described


NESTED = "vms:\n  - address: a\n    disks: [{disk: d, ranges: "
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "p.yaml:1:33: is nested more than 32 levels"),
        (NESTED + "[" * 100_000, "nested more than 32 levels"),
        ("{a: " * 100_000, "nested more than 32 levels"),
        ("- " * 100_000, "nested more than 32 levels"),
        ("? " * 100_000, "nested more than 32 levels"),
        ("!!x [" * 50_000, "nested more than 32 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 32 levels"),
        (LAUGHS, "more than 100000 values"),
        ("vms: &a [*a]", "undefined alias"),
        ("vms: *a", "undefined alias"),
        ("vms: [" + "x, " * 100_001 + "]", "more than 100000 values"),
        ("vms: " + "x" * (1 << 20), "more than 1048576 characters"),
        ("parallel: " + "9" * 10_000, "not a whole number"),
        ("speed: " + "9" * 10_000 + "G\nvms: []", "speed"),
        ("speed: " + "1+" * 9000 + "1\nvms: 5", "vms"),
        ("vms: \ud800", "not YAML|no UTF-8"),
        ("vms: \0", "not YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_policy_costs_nothing(text, words):
    with pytest.raises(PolicyError, match=words):
        parse(text)


def test_a_policy_without_end_is_not_read(tmp_path):
    path = tmp_path / "p.yaml"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(PolicyError):
        load_policy(path)


def test_aliases_stand_for_what_they_name():
    said = "vms:\n- address: a\n  disks: &d [{disk: x, ahead: &s 1M}]\n- {address: b, disks: *d}"
    assert [(one.address, one.disk) for one in parse(said).disks] == [("a", "x"), ("b", "x")]
