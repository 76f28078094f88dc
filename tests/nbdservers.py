"""NBD servers of the system's qemu-nbd, with TLS or without, for copies that go there."""

import asyncio
import contextlib
import os
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


def make_credentials_of(kind, root):
    """Make them for migrations: `x509`, or `psk` alone, by the name that QEMU has for itself."""
    folder = make_credentials(root)
    for role in ("client", "server"):
        keys = folder / role / "keys.psk"
        if kind == "psk":
            keys.write_text("qemu:" + "5a" * 32 + "\n")
        else:
            keys.unlink()
    return folder


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


class CutOffError(Exception):
    """This host has no network of its own to give: a test that needs one is skipped."""


@contextlib.asynccontextmanager
async def serving_elsewhere(image, number):
    """Run qemu-nbd for an image in a network of its own; yields its address, and the wire to it.

    :param number: of the network, 0 to 255; the wire is its name here.
    :raise CutOffError: this user may make none.
    """
    here, there, wire = f"10.231.{number}.1", f"10.231.{number}.2", f"qmpblock{number}"
    words = ["-t", "-x", "t", "-f", "raw", "-b", there, "-p", "10809", str(image)]
    wait = ["unshare", "--net", "sh", "-c", 'read go && exec "$@"', "sh"]
    process = subprocess.Popen(
        [*wait, peers.qemu_nbd("system"), *words],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CutOffError(f"{' '.join(command)}: {done.stderr.strip()}")

    def apart():
        mine = os.readlink("/proc/self/ns/net")
        if process.poll() is not None:
            raise CutOffError("unshare --net: not permitted")
        return os.readlink(f"/proc/{process.pid}/ns/net") != mine

    def listens():
        assert process.poll() is None
        with socket.socket() as probe:
            probe.settimeout(1)
            try:
                probe.connect((there, 10809))
            except OSError:
                return False
        return True

    try:
        await until(apart, "a network of its own")
        inside = ("nsenter", f"--target={process.pid}", "--net", "ip")
        peer = ("peer", "name", "wire", "netns", str(process.pid))
        run("ip", "link", "add", wire, "type", "veth", *peer)
        run("ip", "address", "add", f"{here}/30", "dev", wire)
        run("ip", "link", "set", wire, "up")
        run(*inside, "address", "add", f"{there}/30", "dev", "wire")
        run(*inside, "link", "set", "wire", "up")
        process.stdin.write(b"go\n")
        process.stdin.flush()
        await until(listens, "a server")
        yield there, wire
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
        process.stdin.close()
        # Its network would take the wire with it, but only once all that was sent is given up.
        subprocess.run(["ip", "link", "delete", wire], capture_output=True, check=False)


def slow_down(wire, rate):
    """Have a wire take no more than so many bytes a second of what is sent from here.

    :raise CutOffError: this host's kernel cannot.
    """
    limit = ["rate", f"{rate * 8}bit", "burst", "64kb", "latency", "500ms"]
    command = ["tc", "qdisc", "add", "dev", wire, "root", "tbf", *limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CutOffError(f"{' '.join(command)}: {done.stderr.strip()}")


def set_wire(wire, *, up):
    """Plug a wire in, or cut it: what is sent then is lost, and neither end is told."""
    subprocess.run(["ip", "link", "set", wire, "up" if up else "down"], check=True)
