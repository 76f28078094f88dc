"""Keys in files that are not as they should be, and in the words of other processes."""

import asyncio
import json
import logging

import pytest
from fake_qmp import fake_qmp

from qmpblock.errors import Error, StalledError
from qmpblock.host.processes import shown_words
from qmpblock.nbd.tls import _read_key
from qmpblock.qemu.monitor import Monitor

KEY = "5ec4e75ec4e75ec4e75ec4e75ec4e75ec4e7"


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"{KEY}\n{KEY}x",
        f":{KEY}",
        f"alice {KEY}",
        f"alice:{KEY}g",
        f"alice:{KEY}:{KEY}",
        f"alice:{KEY}\nbob:{KEY}",
        f"alice:{KEY}\n{KEY}",
        "alice:",
        f"{KEY}:",
    ],
)
@pytest.mark.parametrize("username", [None, "eve"])
def test_a_file_of_keys_that_cannot_be_used(tmp_path, text, username):
    """No key is in the message, nor is one sent as if it were the name of a user."""
    (tmp_path / "keys.psk").write_text(text)
    with pytest.raises(Error) as caught:
        _read_key(tmp_path / "keys.psk", username)
    assert KEY[:8] not in str(caught.value)


def test_a_key_that_can_be_used(tmp_path):
    (tmp_path / "keys.psk").write_text(f"alice:{KEY}\n")
    assert _read_key(tmp_path / "keys.psk", None) == ("alice", bytes.fromhex(KEY))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("-object", "secret,id=a,data=sesame"), "-object secret,id=a,data=..."),
        (("-object", "secret,data=a,,b,id=c"), "-object secret,data=...,id=c"),
        (("-object", '{"id": "a", "data": "ses\\"ame"}'), '-object {"id": "a", "data": "..."}'),
        (("-vnc", ":1,password=sesame"), "-vnc :1,password=..."),
        (("--password", "sesame"), "--password ..."),
        (("-spice", "port=1,password=sesame,tls-port=2"), "-spice port=1,password=...,tls-port=2"),
        (("-device", "virtio-blk,drive=data"), "-device virtio-blk,drive=data"),
        (("-drive", "file=a,password-secret=key0"), "-drive file=a,password-secret=key0"),
    ],
)
def test_the_words_of_another_process_are_shown_without_keys(words, shown):
    assert shown_words(words) == shown


@pytest.mark.parametrize("given_up", ["stalled", "cancelled"])
async def test_a_key_that_comes_too_late_is_in_no_log(tmp_path, caplog, monkeypatch, given_up):
    """Whoever asked has given up, and the reply comes all the same."""
    caplog.set_level(logging.DEBUG)
    async with (
        fake_qmp(tmp_path / "q", replies={"qom-get": b""}) as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with monkeypatch.context() as patch:
            if given_up == "stalled":
                patch.setattr(monitor, "stall", 0.2)
            asked = asyncio.create_task(monitor.read_key("/objects/a", "data"))
            while len(fake.seen) < 2:
                await asyncio.sleep(0.01)
            if given_up == "cancelled":
                asked.cancel()
            with pytest.raises((StalledError, asyncio.CancelledError)):
                await asked
        late = {"return": KEY, "id": fake.seen[-1]["id"]}
        fake.writer.write(json.dumps(late).encode() + b"\n")
        await monitor.execute("query-name")
    assert "query-name" in caplog.text
    assert KEY not in caplog.text
