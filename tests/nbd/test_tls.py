"""TLS: credentials in QEMU's layout, against qemu-nbd and nbdkit, and under custody."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import fake_server as fake
import peers
import pki as pki_of
import pytest

from qmpblock.errors import (
    NBDConnectError,
    NBDProtocolError,
    RequestError,
    StalledError,
    UnsupportedError,
)
from qmpblock.nbd import Client, tls_context
from qmpblock.nbd.tls import TLSLayer, _read_key

HOST = "nbd.example"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `server` and `client` as QEMU wants them, and `stranger` from another authority."""
    root = tmp_path_factory.mktemp("pki")
    for name, authority in (("ours", "Test CA"), ("other", "Other CA")):
        pki_of.authority(root / name, authority)
    for folder, authority in (("server", "ours"), ("client", "ours"), ("stranger", "other")):
        pki_of.certificate(
            root / folder,
            root / authority,
            "server" if folder == "server" else "client",
            HOST if folder == "server" else folder,
        )
        (root / folder / "ca-cert.pem").write_bytes((root / authority / "ca-cert.pem").read_bytes())
    return root


def _qemu_options(pki: Path, verify: str = "yes") -> tuple[str, str]:
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={pki / 'server'},verify-peer={verify}"
    return f"--object={creds}", "--tls-creds=t"


@pytest.fixture(params=["qemu-nbd", "qemu-nbd 11", "nbdkit"])
def secure_server(request: pytest.FixtureRequest, pki: Path, tmp_path: Path) -> Iterator[str]:
    """Serve 64 MiB by each server, which demands TLS and a certificate of ours."""
    if request.param == "nbdkit":
        serving = peers.serving_nbdkit(
            tmp_path / "s", "--tls=require", f"--tls-certificates={pki / 'server'}",
            "--tls-verify-peer", "memory", "64M",
        )  # fmt: skip
    else:
        image = peers.make_qcow2(tmp_path / "image", "64M")
        version = "11" if request.param.endswith("11") else "system"
        serving = peers.serving_image(version, image, tmp_path / "s", *_qemu_options(pki))
    with serving as address:
        yield address


async def test_requests_over_tls(secure_server: str, pki: Path):
    async with await Client.connect(
        secure_server,
        tls=tls_context(pki / "client"),
        tls_hostname=HOST,
        contexts=["base:allocation"],
    ) as client:
        data = bytes(range(256)) * (40 << 12)  # 40 MiB: many records, more than one request
        await client.write(12345, data)
        assert await client.read(12345, len(data)) == data
        status = await client.block_status(0, client.size)
        assert status["base:allocation"][-1].tolist()[1] == 3
        reads = await asyncio.gather(*(client.read(12345 + 256 * i, 256) for i in range(100)))
        assert all(read == bytes(range(256)) for read in reads)


async def test_contexts_listed_over_tls(secure_server: str, pki: Path):
    contexts = await Client.list_contexts(
        secure_server, tls=tls_context(pki / "client"), tls_hostname=HOST
    )
    assert "base:allocation" in contexts


async def test_without_tls_a_demanding_server_is_not_used(secure_server: str):
    with pytest.raises(NBDConnectError, match="demands TLS"):
        await Client.connect(secure_server)


async def test_the_wrong_host_name(secure_server: str, pki: Path):
    with pytest.raises(NBDConnectError, match=r"certificate is not acceptable.*other\.example"):
        await Client.connect(
            secure_server, tls=tls_context(pki / "client"), tls_hostname="other.example"
        )


async def test_a_server_of_another_authority(secure_server: str, pki: Path):
    with pytest.raises(NBDConnectError, match="certificate is not acceptable"):
        await Client.connect(secure_server, tls=tls_context(pki / "stranger"), tls_hostname=HOST)


async def test_a_client_that_the_server_does_not_know(
    secure_server: str, pki: Path, tmp_path: Path
):
    mixed = tmp_path / "mixed"
    shutil.copytree(pki / "stranger", mixed)
    shutil.copy(pki / "client" / "ca-cert.pem", mixed)
    with pytest.raises(NBDConnectError):
        async with await Client.connect(
            secure_server, tls=tls_context(mixed), tls_hostname=HOST
        ) as client:
            await client.read(0, 512)


async def test_tls_is_never_silently_left_out(tmp_path: Path, pki: Path):
    with (
        peers.serving_nbdkit(tmp_path / "s", "memory", "1M") as address,
        pytest.raises(NBDConnectError, match="refused STARTTLS"),
    ):
        await Client.connect(address, tls=tls_context(pki / "client"), tls_hostname=HOST)


@pytest.mark.parametrize(
    ("alternative", "host", "good"),
    [
        ("", HOST, False),  # nothing but a CN
        ("", "192.0.2.7", False),
        ("DNS:192.0.2.7", "192.0.2.7", False),  # an address is no host name
        ("IP:192.0.2.8", "192.0.2.7", False),
        ("URI:nbd://nbd.example", HOST, False),
        ("DNS:*.nbd.example", "disk.nbd.example", True),
        ("DNS:n*.example", HOST, False),
        ("IP:192.0.2.7", "192.0.2.7", True),
        ("DNS:nbd.example", HOST, True),
    ],
)
async def test_whom_a_certificate_names(
    alternative: str, host: str, good: bool, pki: Path, tmp_path: Path
):
    """By its subjectAltName alone: host names as DNS, addresses as IP (RFC 9525)."""
    shutil.copytree(pki / "server", tmp_path / "server")
    pki_of.certificate(tmp_path / "server", pki / "ours", "server", host, alternative)
    options = _qemu_options(tmp_path)
    image = peers.make_qcow2(tmp_path / "image", "1M")
    with peers.serving_image("system", image, tmp_path / "s", *options) as address:
        connecting = Client.connect(address, tls=tls_context(pki / "client"), tls_hostname=host)
        if good:
            async with await connecting as client:
                await client.flush()
        else:
            with pytest.raises(NBDConnectError, match="subjectAltName"):
                await connecting


# -- a server of our own, for what real ones do not do


class _SecureServer(fake.FakeServer):
    """The fake server, over TLS from `secure` on."""

    def secure(self, pki: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            pki / "server" / "server-cert.pem", pki / "server" / "server-key.pem"
        )
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self.plain, self.closed = b"", False
        self._taken = 0

    async def shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self._in.write(await self.receive_some())
            else:
                await self._flush()
                return

    async def receive_some(self) -> bytes:
        if self._seen == len(self.received):
            await self._more()
        self._seen, start = len(self.received), self._seen
        return self.received[start:]

    async def _flush(self) -> None:
        await super().send(self._out.read())

    async def send_secure(self, data: bytes) -> None:
        self._tls.write(data)
        await self._flush()

    async def receive_secure(self, length: int) -> bytes:
        while len(self.plain) - self._taken < length:
            try:
                self.plain += self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                self._in.write(await self.receive_some())
        self._taken += length
        return self.plain[self._taken - length : self._taken]


async def _serve_secure(server: _SecureServer, pki: Path) -> None:
    """Shake hands for NBD and TLS, then serve the options under TLS, up to GO."""
    server.secure(pki)
    await server.handshake(until=fake.STARTTLS)
    await server.shake_hands()
    option = 0
    while option != fake.GO:
        head = await server.receive_secure(16)
        option = int.from_bytes(head[8:12])
        await server.receive_secure(int.from_bytes(head[12:]))
        await server.send_secure(fake.answer_option(server.settings, option))


@pytest.mark.parametrize("polite", [True, False])
async def test_the_end_of_tls(polite: bool, pki: Path):
    """Polite: DISC and close_notify. Under custody: not a byte, and no end."""
    rest = None

    async def script(server: fake.FakeServer) -> None:
        nonlocal rest
        assert isinstance(server, _SecureServer)
        await _serve_secure(server, pki)
        rest = await server.drain(0.3)
        if polite:
            server._in.write(rest)
            assert server._tls.read(100)[4:8] == bytes.fromhex("00000002")
            assert server._tls.read(100) == b""  # close_notify
        server.hang_up()

    settings = fake.Settings(tls=True)
    async with _SecureServer(script, settings, custody=not polite) as server:
        client = await Client.connect(
            server.socket, tls=tls_context(pki / "client"), tls_hostname=HOST, polite=polite
        )
        await client.close()
    assert bool(rest) is polite
    assert not server.eof


@pytest.mark.parametrize("polite", [True, False])
async def test_no_alert_leaves_under_custody(polite: bool, pki: Path):
    """A certificate that is refused: politely with an alert, else without a word."""
    rest = None

    async def script(server: fake.FakeServer) -> None:
        nonlocal rest
        assert isinstance(server, _SecureServer)
        server.secure(pki)
        await server.handshake(until=fake.STARTTLS)
        server._in.write(await server.receive_some())
        with pytest.raises(ssl.SSLWantReadError):
            server._tls.do_handshake()
        await server._flush()
        rest = await server.drain(0.3)

    settings = fake.Settings(tls=True)
    async with _SecureServer(script, settings, custody=not polite) as server:
        with pytest.raises(NBDConnectError, match="not acceptable"):
            await Client.connect(
                server.socket, tls=tls_context(pki / "stranger"), tls_hostname=HOST, polite=polite
            )
    assert bool(rest) is polite
    assert server.eof is polite


async def test_what_is_tampered_with_is_fatal(pki: Path):
    async def script(server: fake.FakeServer) -> None:
        assert isinstance(server, _SecureServer)
        await _serve_secure(server, pki)
        await server.receive_secure(28)
        server._tls.write(fake.simple(1))
        record = bytearray(server._out.read())
        record[-1] ^= 1
        await server.send(bytes(record))
        await server.drain()

    async with (
        _SecureServer(script, fake.Settings(tls=True)) as server,
        await Client.connect(
            server.socket, tls=tls_context(pki / "client"), tls_hostname=HOST
        ) as client,
    ):
        with pytest.raises(NBDProtocolError, match="TLS failed"):
            await client.flush()


async def test_a_reply_in_plaintext_after_the_tls_handshake_is_fatal(pki: Path):
    async def script(server: fake.FakeServer) -> None:
        assert isinstance(server, _SecureServer)
        await _serve_secure(server, pki)
        await server.receive_secure(28)
        await server.send(fake.simple(1))
        await server.drain()

    async with (
        _SecureServer(script, fake.Settings(tls=True)) as server,
        await Client.connect(
            server.socket, tls=tls_context(pki / "client"), tls_hostname=HOST
        ) as client,
    ):
        with pytest.raises(NBDProtocolError, match="TLS failed"):
            await client.flush()


@pytest.mark.parametrize("injected", [fake.option_reply(11, fake.ACK), b"junk"])
async def test_plaintext_injected_before_the_tls_handshake(injected: bytes, pki: Path):
    async def script(server: fake.FakeServer) -> None:
        await server.greet()
        await server.option()
        await server.send(fake.option_reply(fake.STARTTLS, fake.ACK) + injected)
        await server.drain()

    async with fake.FakeServer(script) as server:
        with pytest.raises(NBDProtocolError, match="plaintext"):
            await Client.connect(server.socket, tls=tls_context(pki / "client"), tls_hostname=HOST)


@pytest.mark.parametrize("end", ["hang up", "say nothing"])
async def test_a_tls_handshake_that_goes_nowhere(end: str, pki: Path):
    async def script(server: fake.FakeServer) -> None:
        await server.handshake(until=fake.STARTTLS)
        if end == "hang up":
            server.hang_up()
        else:
            await server.drain(2)

    async with fake.FakeServer(script, fake.Settings(tls=True)) as server:
        with pytest.raises((NBDConnectError, StalledError)) as caught:
            await Client.connect(
                server.socket, tls=tls_context(pki / "client"), tls_hostname=HOST, stall=0.2
            )
    words = {"hang up": "TLS handshake", "say nothing": "0.2 seconds"}
    assert words[end] in str(caught.value)


# -- credentials


def test_a_host_name_is_needed_over_a_unix_socket(pki: Path):
    with pytest.raises(RequestError, match="tls_hostname"):
        TLSLayer(tls_context(pki / "client"), None)


@pytest.mark.parametrize("name", ["", ".example", "a" * 300])
def test_host_names_that_cannot_be(name: str, pki: Path):
    with pytest.raises(RequestError):
        TLSLayer(tls_context(pki / "client"), name)


async def test_a_socket_given_is_closed_when_the_host_name_is_missing(pki: Path):
    ours, theirs = socket.socketpair()
    with theirs:
        with pytest.raises(RequestError):
            await Client.connect(ours, tls=tls_context(pki / "client"))
        assert ours.fileno() == -1


def test_credentials_that_are_not_there(tmp_path: Path):
    with pytest.raises(RequestError, match=r"neither ca-cert\.pem"):
        tls_context(tmp_path)
    (tmp_path / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(RequestError, match="cannot be used"):
        tls_context(tmp_path)


def test_a_certificate_without_its_key(pki: Path, tmp_path: Path):
    for name in ("ca-cert.pem", "client-cert.pem"):
        shutil.copy(pki / "client" / name, tmp_path)
    with pytest.raises(RequestError, match="cannot be used"):
        tls_context(tmp_path)


async def test_no_client_certificate_is_fine_if_the_server_does_not_ask(pki: Path, tmp_path: Path):
    anonymous = tmp_path / "anonymous"
    anonymous.mkdir()
    shutil.copy(pki / "client" / "ca-cert.pem", anonymous)
    image = peers.make_qcow2(tmp_path / "image", "1M")
    options = _qemu_options(pki, verify="no")
    with peers.serving_image("system", image, tmp_path / "s", *options) as address:
        async with await Client.connect(
            address, tls=tls_context(anonymous), tls_hostname=HOST
        ) as client:
            await client.flush()


@pytest.mark.skipif(
    hasattr(ssl.SSLContext, "set_psk_client_callback"), reason="this Python can use PSK"
)
def test_psk_needs_a_newer_python(tmp_path: Path):
    (tmp_path / "keys.psk").write_text("qemu:0011\n")
    with pytest.raises(UnsupportedError, match=r"Python.*3\.13"):
        tls_context(tmp_path)


@pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_client_callback"),
    reason="this Python's ssl has no PSK (3.13 has)",
)
async def test_psk(tmp_path: Path):
    (tmp_path / "keys.psk").write_text("qemu:00112233445566778899aabbccddeeff\n")
    keys = f"--tls-psk={tmp_path / 'keys.psk'}"
    with peers.serving_nbdkit(tmp_path / "s", "--tls=require", keys, "memory", "1M") as address:
        async with await Client.connect(address, tls=tls_context(tmp_path)) as client:
            await client.flush()


def test_keys_of_a_psk_file(tmp_path: Path):
    path = tmp_path / "keys.psk"
    path.write_text("qemu:0011\n")
    assert _read_key(path, None) == ("qemu", b"\0\x11")
    path.write_text("qemu:0011\nmallory:22\n")
    assert _read_key(path, "mallory") == ("mallory", b"\x22")
    for username in (None, "nobody"):
        with pytest.raises(RequestError, match="qemu, mallory"):
            _read_key(path, username)
    path.write_text("qemu:not hex\n")
    with pytest.raises(RequestError, match="hexkey"):
        _read_key(path, None)
