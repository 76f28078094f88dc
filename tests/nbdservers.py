"""NBD servers of the system's qemu-nbd, with TLS or without, for copies that go there."""

import asyncio
import contextlib
import socket
import subprocess

import peers
import pki
from disturbed import until

HOST = "nbd.example"


def make_credentials(root):
    """Make folders `server` and `client`, each with certificates and with a key that both have."""
    root.mkdir()
    pki.authority(root / "ca", "CA")
    for role in ("server", "client"):
        folder = root / role
        pki.certificate(folder, root / "ca", role, HOST if role == "server" else role)
        (folder / "ca-cert.pem").write_bytes((root / "ca" / "ca-cert.pem").read_bytes())
        (folder / "keys.psk").write_text("alice:" + "5a" * 32 + "\n")
    return root


@contextlib.asynccontextmanager
async def serving(image, *words, port=0, path=None):
    """Run the system's qemu-nbd for an image, on a TCP port or at a path."""
    where = ["-k", str(path)] if path else ["-b", "127.0.0.1", "-p", str(port)]
    command = [peers.qemu_nbd("system"), "-t", "-x", "t", "-f", "raw", *where, *words, str(image)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def listens():
        assert process.poll() is None
        with socket.socket(*([socket.AF_UNIX] if path else [])) as probe:
            try:
                probe.connect(str(path) if path else ("127.0.0.1", port))
            except OSError:
                return False
        return True

    try:
        await until(listens, "a server")
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


def tls_options(folder, kind):
    more = ",verify-peer=yes" if kind == "x509" else ""
    return [
        f"--object=tls-creds-{kind},id=c,endpoint=server,dir={folder / 'server'}{more}",
        "--tls-creds=c",
    ]
