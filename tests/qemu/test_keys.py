"""Which keys can be handed on, and which only QEMU has: recorded properties of objects."""

import asyncio
import os
import subprocess
from types import SimpleNamespace

import pytest
from headers_of_eve import EVE, Place, give, open_to_all

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.errors import CommandError, UnsupportedError
from qmpblock.host.qemuimg import Key
from qmpblock.qemu.keys import read_keys

PLAIN = {"type": "secret", "data": "", "file": "", "format": "raw", "keyid": "", "iv": ""}


def monitor(address=None, pid=None, **objects):
    async def read_key(path, name):
        known = objects.get(path.rpartition("/")[2])
        if known is None:
            raise CommandError("qom-get", None, "DeviceNotFound", f"Device '{path}' not found")
        if name not in known:
            raise CommandError("qom-get", None, "GenericError", f"Property '{name}' not found")
        return known[name]

    where = address or UnixAddress("/run/vm")
    return SimpleNamespace(address=where, peer_pid=pid or os.getpid(), read_key=read_key)


async def test_a_chain_of_keys_comes_lowest_first(tmp_path):
    (tmp_path / "master").write_bytes(b"bWFzdGVy\n")
    found = await read_keys(
        monitor(
            key=PLAIN | {"data": "ZGF0YQ==", "format": "base64", "keyid": "m", "iv": "aXY="},
            m=PLAIN | {"file": str(tmp_path / "master"), "format": "base64"},
        ),
        "key",
    )
    assert found == (Key(b"bWFzdGVy\n", "base64"), Key(b"ZGF0YQ==", "base64", "aXY="))
    assert "ZGF0" not in repr(found)


async def test_a_relative_file_is_qemus(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("sesame")
    monkeypatch.chdir(tmp_path)  # this process stands for QEMU here
    found = await read_keys(monitor(key=PLAIN | {"file": "key"}), "key")
    assert found == (Key(b"sesame"),)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ({"type": "secret_keyring", "serial": "5"}, "only QEMU itself can read"),
        ({"file": "/no/such/file"}, "No such file or directory$"),
        ({"file": "no-such-file"}, "with the key's absolute path"),
        ({"file": "/dev/fd/11"}, "open file of QEMU's own"),
        ({"file": "/dev/stdin"}, "open file of QEMU's own"),
        ({"file": "/proc/self/fd/11"}, "open file of QEMU's own"),
        ({"file": "/dev/null"}, "no regular file"),
        ({"format": "raw,file=/etc/passwd"}, "cannot be told"),
        ({"iv": "x,file=/etc/passwd"}, "cannot be told"),
        ({"keyid": "other"}, "does not tell the key other"),
        ({"keyid": "key"}, "more than 8"),
    ],
)
async def test_what_cannot_be_handed_on(key, why):
    with pytest.raises(UnsupportedError, match=why) as refused:
        await read_keys(monitor(key=PLAIN | {"data": "sesame"} | key), "key")
    assert "sesame" not in str(refused.value)


async def test_what_has_no_such_properties():
    with pytest.raises(UnsupportedError, match="does not tell"):
        await read_keys(monitor(key={"type": "secret"}), "key")


async def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "key")
    with pytest.raises(UnsupportedError, match="no regular file"):
        await read_keys(monitor(key=PLAIN | {"file": str(tmp_path / "key")}), "key")


async def test_a_huge_file_is_no_key(tmp_path):
    with (tmp_path / "key").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(UnsupportedError, match="more than"):
        await read_keys(monitor(key=PLAIN | {"file": str(tmp_path / "key")}), "key")


async def test_no_key_crosses_a_network():
    known = PLAIN | {"data": "sesame"}
    assert await read_keys(monitor(TCPAddress("127.0.0.1", 4444), key=known), "key")
    with pytest.raises(UnsupportedError, match="in the clear"):
        await read_keys(monitor(TCPAddress("vm-host.example", 4444), key=known), "key")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy")
@pytest.mark.parametrize("mode", [0o600, 0o644], ids=["file", "directory"])
async def test_a_file_that_qemus_user_may_not_read_is_no_key(mode):
    """It would be told whether root's file holds what a hostile QEMU's user guesses."""
    with open_to_all() as directory:
        place = Place(directory)
        key = place.root / "key"
        key.write_text("sesame")
        key.chmod(mode)
        place.root.chmod(0o700 if mode == 0o644 else 0o755)
        hers = place.eve / "key"
        hers.write_text("simsim")
        give(hers)
        become = ["setpriv", f"--reuid={EVE}", f"--regid={EVE}", "--clear-groups", "sleep", "60"]
        with subprocess.Popen(become) as process:
            try:
                while os.stat(f"/proc/{process.pid}").st_uid != EVE:
                    await asyncio.sleep(0.01)
                found = await read_keys(
                    monitor(pid=process.pid, key=PLAIN | {"file": str(hers)}), "key"
                )
                assert found == (Key(b"simsim"),)
                with pytest.raises(UnsupportedError, match="QEMU's user may not open it"):
                    await read_keys(monitor(pid=process.pid, key=PLAIN | {"file": str(key)}), "key")
            finally:
                process.kill()
                place.close()
