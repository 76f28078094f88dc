"""The way by which disks and memory go, as it is written."""

import pytest

from qmpblock.address import TCPAddress
from qmpblock.copying.target import Credentials
from qmpblock.errors import RequestError
from qmpblock.migration.over import Over, read_over

X509, KEYS = Credentials("/c"), Credentials("/c", "psk")


def test_with_certificates():
    way = read_over("nbds://h:7", X509, X509, insecure=False)
    assert way == Over(TCPAddress("h", 7), "h", X509, X509)
    assert way.memory == TCPAddress("h", 8)
    assert str(way.target("e")) == "nbds://h:7/e?tls-hostname=h"
    assert read_over("nbds://h/?tls-hostname=n", X509, X509, insecure=False).hostname == "n"


def test_with_keys_nobody_is_named():
    assert read_over("nbds://h", KEYS, KEYS, insecure=False).hostname is None


def test_without_tls():
    way = read_over("nbd://[::1]", None, None, insecure=True)
    assert way == Over(TCPAddress("::1", 10809))
    assert str(way.target("e")) == "nbd://[::1]:10809/e"


@pytest.mark.parametrize(
    ("text", "credentials", "insecure"),
    [
        *(("nbd://h", None, False), ("nbd://h", X509, True), ("nbds://h", None, True)),
        *(
            ("/a/path", X509, False),
            ("nbds://h/export", X509, False),
            ("nbds://h:65535", X509, False),
        ),
        ("nbds+unix:///?socket=/s", X509, False),
    ],
)
def test_refused(text, credentials, insecure):
    with pytest.raises(RequestError):
        read_over(text, credentials, credentials, insecure=insecure)
