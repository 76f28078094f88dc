"""TLS for NBD: credentials in QEMU's layout, and a TLS layer that sends nothing unasked.

The layer is ours, over `ssl.MemoryBIO`, because asyncio's own says close_notify whenever it
closes, and a connection under custody (K1) must say nothing.

This module imports ssl; the client imports this module only when TLS is used.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from qmpblock.errors import (
    NBDConnectError,
    NBDProtocolError,
    RequestError,
    UnsupportedError,
    printable,
)

__all__ = ["TLSLayer", "tls_context"]

_RAW = 64 << 10  # bytes read from the network at once; a TLS record is at most 16 KiB


def tls_context(directory: str | Path, *, username: str | None = None) -> ssl.SSLContext:
    """Load client credentials from a directory in the layout of QEMU's tls-creds objects.

    | tls-creds-x509: ca-cert.pem; ca-crl.pem, client-cert.pem and client-key.pem if there
    | tls-creds-psk: keys.psk, lines of `username:hexkey`

    A directory with ca-cert.pem is x509, whatever else is there. The server's certificate
    must name the host that was connected to, or the `tls_hostname` given, as a subjectAltName:
    a host name as DNS, an address as IP. A common name (CN) is not looked at, as RFC 9525 has it
    (6.3): what it holds is free text, and a CA may sign there what it would not as a host name.
    QEMU's own client, by gnutls, still takes one where there is no DNS name.

    :param username: which key of keys.psk; not needed if there is only one.
    :raise RequestError: the directory holds no usable credentials.
    :raise UnsupportedError: it holds keys.psk, and this Python's ssl cannot do PSK (< 3.13).
    """
    directory = Path(directory)
    if (directory / "ca-cert.pem").exists():
        return _x509(directory)
    if (directory / "keys.psk").exists():
        return _psk(directory / "keys.psk", username)
    raise RequestError(f"{directory} has neither ca-cert.pem (x509) nor keys.psk (PSK)")


def _x509(directory: Path) -> ssl.SSLContext:
    certificate, key, revoked = (
        directory / name for name in ("client-cert.pem", "client-key.pem", "ca-crl.pem")
    )
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.hostname_checks_common_name = False
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_verify_locations(directory / "ca-cert.pem")
        if revoked.exists():
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        if certificate.exists():
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise RequestError(f"the TLS credentials in {directory} cannot be used: {error}") from error
    return context


def _psk(path: Path, username: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    set_callback = getattr(context, "set_psk_client_callback", None)
    if set_callback is None:
        raise UnsupportedError(
            f"{path} holds pre-shared keys, which this Python cannot use",
            remedy="use Python 3.13 or newer, or x509 credentials",
        )
    name, key = _read_key(path, username)
    context.check_hostname = False  # there is no certificate: the shared key is the proof
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # Python's callback cannot name a 1.3 hash
    context.set_ciphers("PSK")
    set_callback(lambda hint: (name, key))
    return context


def _read_key(path: Path, username: str | None) -> tuple[str, bytes]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise RequestError(f"{path} is not lines of username:hexkey") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        # A key that is taken for a name would be sent, and shown: so nothing is guessed.
        name, _, digits = line.strip().partition(":")
        try:
            keys[name] = bytes.fromhex(digits)
        except ValueError:
            keys[name] = b""
        if line.strip() and not (name and keys[name]):
            raise RequestError(f"line {number} of {path} is not username:hexkey")
    keys.pop("", None)
    if username is None and len(keys) == 1:
        return next(iter(keys.items()))
    if username is None or not keys.get(username):
        raise RequestError(
            f"{path} has no key for {printable(username or 'no user name')}",
            remedy="name one of: " + printable(", ".join(keys)),
        )
    return username, keys[username]


class TLSLayer:
    """TLS between a network and a byte stream, without I/O.

    :param context: the credentials.
    :param hostname: whom the server's certificate must name.
    :raise RequestError: the context checks host names and there is none, or it is not one.
    """

    def __init__(self, context: ssl.SSLContext, hostname: str | None) -> None:
        if context.check_hostname and not hostname:
            raise RequestError(
                "TLS over this socket needs to know whom the server's certificate names",
                remedy="give tls_hostname",
            )
        self._from_network = ssl.MemoryBIO()
        self._to_network = ssl.MemoryBIO()
        try:
            self._object = context.wrap_bio(
                self._from_network, self._to_network, server_side=False, server_hostname=hostname
            )
        except ValueError as error:  # not a host name; UnicodeError is one
            raise RequestError(
                f"the TLS host name {printable(hostname)} cannot be used: {printable(error)}"
            ) from error
        self._raw = memoryview(bytearray(_RAW))
        self.established = False

    def get_buffer(self) -> memoryview:
        """Return where to write the next bytes from the network."""
        return self._raw

    def buffer_updated(self, length: int) -> None:
        """Take `length` bytes that were written to `get_buffer()`."""
        self._from_network.write(self._raw[:length])

    def receive_eof(self) -> None:
        """Take note that the network has ended."""
        self._from_network.write_eof()

    def shake_hands(self) -> bool:
        """Go on with the TLS handshake; return whether it is done.

        :raise NBDConnectError: the server's certificate, or ours, was not accepted.
        """
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLCertVerificationError as error:
            why = printable(error.verify_message)
            raise NBDConnectError(
                f"the NBD server's certificate is not acceptable: {why}",
                remedy="check ca-cert.pem, and that the certificate names this host as a "
                "subjectAltName, DNS:NAME or IP:ADDRESS; a common name (CN) alone does not count",
            ) from error
        except OSError as error:
            raise NBDConnectError(
                f"the TLS handshake with the NBD server failed: {printable(error)}",
                remedy="check the credentials of both sides; the server's log may say more",
            ) from error
        self.established = True
        return True

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt into `buffer`; return how many bytes, 0 if there are none now.

        :raise EOFError: the server ended the TLS session, or the network ended.
        :raise NBDProtocolError: what came is not TLS, or was tampered with.
        :raise NBDConnectError: the server rejects our certificate (TLS 1.3 says so late).
        """
        try:
            length = self._object.read(len(buffer), buffer)
        except ssl.SSLWantReadError:
            return 0
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            raise EOFError from None
        except ssl.SSLError as error:
            reason = error.reason or ""
            if "ALERT" in reason:
                raise NBDConnectError(
                    f"the NBD server ended the TLS session: {printable(reason)}",
                    remedy="check that the server trusts client-cert.pem",
                ) from error
            raise NBDProtocolError(f"TLS failed: {printable(error)}") from error
        if not length:
            raise EOFError
        return int(length)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt `data`; `data_to_send` has the result."""
        self._object.write(data)

    def close_notify(self) -> None:
        """Say that we shall send nothing more."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            return  # want read: the server has not said so yet, and we do not wait for it

    def data_to_send(self) -> bytes:
        """Return what to write to the network since the last call."""
        return self._to_network.read()
