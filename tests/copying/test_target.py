"""Targets of a copy: words that are read, written, and refused."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.copying.target import (
    Credentials,
    NBDTarget,
    PathTarget,
    credentials_object,
    format_node,
    nbd_node,
    parse_target,
    path_node,
)
from qmpblock.errors import RequestError

UNIX = UnixAddress("/run/s")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/v/disk.qcow2", PathTarget("/v/disk.qcow2")),
        ("disk.raw", PathTarget("disk.raw")),
        ("/dev/disk/by-path/pci-0000:00:1f.2", PathTarget("/dev/disk/by-path/pci-0000:00:1f.2")),
        ("./nbd://host/e", PathTarget("./nbd://host/e")),
        ("backup:monday", PathTarget("backup:monday")),
        ("nbd://host", NBDTarget(TCPAddress("host", 10809), "")),
        ("nbd://host/", NBDTarget(TCPAddress("host", 10809), "")),
        ("NBD://Host:1/e", NBDTarget(TCPAddress("Host", 1), "e")),
        ("nbd://10.0.0.1:10810/a/b", NBDTarget(TCPAddress("10.0.0.1", 10810), "a/b")),
        ("nbd://h//e", NBDTarget(TCPAddress("h", 10809), "/e")),
        ("nbd://[::1]/a%20b%2Fc", NBDTarget(TCPAddress("::1", 10809), "a b/c")),
        ("nbd://[fe80::1%25eth0]:7/e", NBDTarget(TCPAddress("fe80::1%eth0", 7), "e")),
        ("nbds://host/e", NBDTarget(TCPAddress("host", 10809), "e", tls=True)),
        (
            "nbds://10.0.0.1/e?tls-hostname=store.example",
            NBDTarget(TCPAddress("10.0.0.1", 10809), "e", tls=True, tls_hostname="store.example"),
        ),
        ("nbd+unix:///e?socket=/run/s", NBDTarget(UNIX, "e")),
        ("nbd+unix:///?socket=/run/s", NBDTarget(UNIX, "")),
        ("nbd+unix:///%C3%A4?socket=/a%26b", NBDTarget(UnixAddress("/a&b"), "ä")),
        (
            "nbds+unix:///e?socket=/run/s&tls-hostname=h",
            NBDTarget(UNIX, "e", tls=True, tls_hostname="h"),
        ),
    ],
)
def test_what_is_read(text, wanted):
    assert parse_target(text) == wanted
    assert parse_target(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names nothing"),
        ("a\0b", "names nothing"),
        ("/v/\udcff", "QMP can carry nothing else"),
        ("ssh://host/x", "ssh is none of its schemes"),
        ("nbd+vsock://2/e", "none of its schemes"),
        ("nbd:host:10809:exportname=e", "notation of QEMU's own"),
        ('json:{"driver":"nbd"}', "notation of QEMU's own"),
        ("nbd://", "no host"),
        ("nbd:///e", "no host"),
        ("nbd://-h/e", "no host"),
        ("nbd://a b/e", "no host"),
        ("nbd://::1/e", "in brackets"),
        ("nbd://[::1/e", "in brackets"),
        ("nbd://[host]/e", "no host"),
        ("nbd://h:/e", "port"),
        ("nbd://h:0/e", "port"),
        ("nbd://h:65536/e", "port"),
        ("nbd://h:0x1/e", "port"),
        ("nbd://h:\u0661/e", "port"),
        ("nbd://u@h/e", "a user in it"),
        ("nbds://u:geheim@h/e", "a user in it"),
        ("nbd://h/e#f", "fragment"),
        ("nbd://h/%zz", "hex digits"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/" + "e" * 4097, "4096 bytes"),
        ("nbd://h/e?x=1", "not known: x"),
        ("nbd://h/e?socket=/s", "not known: socket"),
        ("nbd://h/e?tls-hostname=h", "without TLS"),
        ("nbds://h/e?tls-hostname=", "no host's name"),
        ("nbds://h/e?tls-hostname=a&tls-hostname=b", "twice"),
        ("nbds://h/e?tls-hostname", "without a value"),
        ("nbds://h/e?tls-certificates=/d", "not known: tls-certificates"),
        ("nbd+unix:///e", "no socket"),
        ("nbd+unix:///e?socket=", "no socket"),
        ("nbd+unix://h/e?socket=/s", "has a host"),
        ("nbd+unix://?socket=/s", "slash"),
        ("nbd+unix:///e?socket=/" + "s" * 107, "107 bytes"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(RequestError, match=words):
        parse_target(text)


@pytest.mark.parametrize("text", ["nbds://alice:geheim@h/e", "ssh://a:geheim@h", "nbd://geheim@?x"])
def test_a_password_that_somebody_wrote_is_not_shown(text):
    with pytest.raises(RequestError, match="as options") as caught:
        parse_target(text)
    assert "geheim" not in str(caught.value)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    st.ip_addresses().map(str),
)
SERVERS = st.one_of(
    st.builds(TCPAddress, HOSTS, st.integers(1, 65535)),
    TEXT.filter(lambda path: 0 < len(path.encode()) < 108).map(UnixAddress),
)


@given(SERVERS, TEXT, st.none() | HOSTS, st.booleans())
def test_what_is_written_is_read_again(server, export, hostname, tls):
    target = NBDTarget(server, export, tls, hostname if tls else None)
    assert parse_target(str(target)) == target


@given(TEXT.filter(bool))
@example("nbd://h/e")
@example("x:y")
def test_a_path_is_written_so_that_it_is_read_as_a_path(path):
    read = parse_target(str(PathTarget(path)))
    assert isinstance(read, PathTarget)
    assert read.path in (path, f"./{path}")


@given(
    st.sampled_from(["nbd://", "nbds://", "nbd+unix://", "nbds+unix://", ""]),
    st.text(string.printable),
)
def test_any_word_is_a_target_that_says_itself_or_is_refused(scheme, rest):
    try:
        target = parse_target(scheme + rest)
    except RequestError as error:
        assert error.remedy
        return
    again = parse_target(str(target))
    assert again == target or isinstance(target, PathTarget)


def test_the_options_of_the_nodes():
    assert path_node(PathTarget("/d"), "n", block_device=False)["driver"] == "file"
    device = path_node(PathTarget("/dev/x"), "n", block_device=True, direct=True)
    assert (device["driver"], device["cache"]) == ("host_device", {"direct": True})
    plain = nbd_node(NBDTarget(UNIX, "e"), "n", socket="/s")
    assert plain["server"] == {"type": "unix", "path": "/s"}
    assert plain["reconnect-delay"] == 0
    assert "tls-creds" not in plain
    secret = nbd_node(
        NBDTarget(TCPAddress("h", 1), "e", tls=True), "n", socket="/s", credentials="c"
    )
    assert (secret["tls-creds"], secret["tls-hostname"]) == ("c", "h")
    nameless = nbd_node(NBDTarget(UNIX, "e", tls=True), "n", socket="/s", credentials="c")
    assert "tls-hostname" not in nameless
    assert format_node("qcow2", "f", "n")["backing"] is None
    assert "backing" not in format_node("raw", "f", "n")
    x509 = credentials_object(Credentials("/d"), "c")
    assert (x509["qom-type"], x509["verify-peer"]) == ("tls-creds-x509", True)
    psk = credentials_object(Credentials("/d", "psk", "alice"), "c")
    assert (psk["qom-type"], psk["username"]) == ("tls-creds-psk", "alice")
    assert "username" not in credentials_object(Credentials("/d", "psk"), "c")
