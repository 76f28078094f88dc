"""Authorities and certificates for tests, in the layout of QEMU's tls-creds objects."""

from __future__ import annotations

import subprocess
from pathlib import Path

import peers

_KEY = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    command = [peers.need("openssl"), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    """Make one in a folder, as `ca-cert.pem` and `ca-key.pem`."""
    folder.mkdir(exist_ok=True)
    _openssl(
        "req", "-x509", "-newkey", *_KEY, "-days", "2", "-subj", f"/CN={name}",
        "-keyout", folder / "ca-key.pem", "-out", folder / "ca-cert.pem",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip


def certificate(
    folder: Path, authority: Path, role: str, name: str, alternative: str | None = None
) -> None:
    """Make one; `alternative` is its subjectAltName, by default the name, empty for none."""
    folder.mkdir(exist_ok=True)
    request = folder / f"{role}.csr"
    _openssl(
        "req", "-newkey", *_KEY, "-subj", f"/CN={name}",
        "-keyout", folder / f"{role}-key.pem", "-out", request,
    )  # fmt: skip
    extensions = folder / f"{role}.ext"
    if alternative is None:
        alternative = f"DNS:{name}"
    extensions.write_text(
        (f"subjectAltName={alternative}\n" if alternative else "")
        + f"extendedKeyUsage={role}Auth\n"
        "keyUsage=critical,digitalSignature,keyEncipherment\nbasicConstraints=CA:FALSE\n"
    )
    _openssl(
        "x509", "-req", "-days", "2", "-in", request, "-CA", authority / "ca-cert.pem",
        "-CAkey", authority / "ca-key.pem", "-CAcreateserial", "-extfile", extensions,
        "-out", folder / f"{role}-cert.pem",
    )  # fmt: skip
