"""What is fuzzed: a small function for each reader of what others say.

A target takes bytes and returns nothing. What its reader may raise it expects; whatever else
comes out of it, a failed assertion about what was read among it, is a fault.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import backuppoints
import drawing
import driving
import fake_server as fake
import numpy as np

from fuzz.source import Source, disturbed, words_of
from qmpblock.backups.directory import open_backups
from qmpblock.backups.imagefile import why_changed
from qmpblock.backups.point import (
    every_image,
    find_point,
    image_names,
    images_of,
    restored_names,
)
from qmpblock.changes.journal import Journal
from qmpblock.changes.journalfile import JournalFile
from qmpblock.changes.operations import read_record
from qmpblock.cli.backupsoutput import list_document, said_points
from qmpblock.copying.target import NBDTarget, PathTarget, parse_target
from qmpblock.errors import Error, RecordError, RequestError, UnsupportedError
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.extents.blockstatus import NBDMapBuilder
from qmpblock.graph.builder import Replies, build
from qmpblock.host.statedirectory import OpenDirectory
from qmpblock.nbd import wire
from qmpblock.nbd.protocol import Finished, Opened, Protocol, Wanted
from qmpblock.nbd.transmission import Transmission
from qmpblock.policy.file import parse_policy
from qmpblock.qemu.lock import Holder
from qmpblock.versioned import UnreadableError
from qmpblock.yamltext import read_mapping

__all__ = ["SEEDS", "TARGETS"]

_DATA = Path(__file__).parents[1] / "data"
_SIZE = 1 << 20
_CONTEXTS = {1: "base:allocation", 2: "qemu:allocation-depth"}
_OFFERS = {
    style: fake.Settings(style, _SIZE, contexts=_CONTEXTS if style != fake.SIMPLE else {})
    for style in fake.STYLES
}


_SESSIONS = {style: driving.opened(offer).session for style, offer in _OFFERS.items()}


# -- NBD


def nbd_wire(data: bytes) -> None:
    """The codecs of messages whose length the server chose."""
    kind = data[:1]
    for decode in (wire.decode_info_type, wire.decode_info_export, wire.decode_info_block_size,
                   wire.decode_meta_context):  # fmt: skip
        with suppress(Error):
            decode(data[1:])
    with suppress(Error):
        said = wire.decode_error(wire.ERROR_BIT | kind[0] if kind else 0, data[1:])
        assert said.error
    if len(data) >= wire.OPTION_REPLY_SIZE:
        with suppress(Error):
            assert wire.decode_option_reply(data[: wire.OPTION_REPLY_SIZE]).length <= 8192
    for style in (wire.HeaderStyle.STRUCTURED, wire.HeaderStyle.EXTENDED):
        if wire.status_length_legal(style, len(data)):
            with suppress(Error):
                _, extents = wire.decode_block_status(style, data)
                assert extents.shape[1] == 2


def nbd_handshake(data: bytes) -> None:
    """Everything that a server says from the greeting on."""
    source = Source(data)
    settings = _OFFERS[source.pick(fake.STYLES)]
    choice = source.byte()
    protocol = Protocol(
        Wanted(
            contexts=tuple(settings.contexts.values()),
            tls=choice % 8 == 1,
            queries=("qemu:",) if choice % 8 == 2 else None,
        ),
        polite=choice < 128,
    )
    protocol.receive_data(fake.greeting(3 if choice & 64 else source.byte()))
    while source.left and protocol.failure is None:
        kind = source.byte()
        if kind < 128:
            said = fake.answer_option(settings, source.pick((5, 7, 8, 9, 10, 11)))
        elif kind < 192:
            option, reply = source.pick((5, 7, 8, 9, 10, 11)), source.pick((1, 2, 3, 4, 1 << 31))
            said = fake.option_reply(option, reply | source.byte() % 16, source.bytes(kind % 24))
        else:
            said = source.bytes(1 + kind % 64)
        protocol.receive_data(said)
        protocol.data_to_send()
    protocol.receive_eof()
    _sound(protocol)


def nbd_transmission(data: bytes) -> None:
    """Replies to five requests, their chunks in any order and of any kind."""
    source = Source(data)
    style = source.pick(fake.STYLES)
    protocol = _opened(style)
    buffer = bytearray(8192)
    sent = {protocol.send_read(4096, memoryview(buffer)): 8192}
    sent[protocol.send_write(0, bytes(512))] = 512
    sent[protocol.send_command(wire.Command.FLUSH)] = 0
    if style != fake.SIMPLE:
        one = wire.CommandFlag.REQ_ONE
        sent[protocol.send_block_status(0, _SIZE)] = _SIZE
        sent[protocol.send_block_status(65536, 4096, one)] = 4096
    held = 0
    while source.left and protocol.failure is None:
        protocol.receive_data(_said(source, style))
        for event in protocol.events_received():
            assert isinstance(event, Finished)
            length = sent.pop(event.cookie)
            if isinstance(event.result, Mapping):
                for extents in event.result.values():
                    held += len(extents)
                    assert (extents[:, 0] > 0).all()
                    assert 0 < int(extents[:, 0].sum()) <= length
            elif event.result is not None:
                assert len(event.result) == length
        assert protocol.in_flight == len(sent) or protocol.failure is not None
    protocol.receive_eof()
    _sound(protocol)


def _opened(style: str) -> Protocol:
    """Return a protocol whose handshake is over, without paying for one each time."""
    protocol = Protocol(Wanted())
    protocol._transmission = Transmission(_SESSIONS[style])
    protocol._parser = protocol._transmission.parse()
    protocol._need = next(protocol._parser)
    return protocol


def _said(source: Source, style: str) -> bytes:
    kind, cookie = source.byte(), source.byte() % 7
    if kind < 24:
        return fake.simple(cookie, source.pick((0, 0, 5, 108)), source.bytes(source.byte()))
    if kind > 240:
        return source.bytes(kind - 239)
    what = source.pick((fake.NONE, fake.DATA, fake.HOLE, fake.STATUS, fake.STATUS_EXT,
                        fake.ERROR, fake.ERROR_OFFSET, 0x8005, 9))  # fmt: skip
    if what == fake.DATA:
        payload = fake.data_payload(4096 + source.unsigned(13), bytes(source.unsigned(14)))
    elif what == fake.HOLE:
        payload = fake.hole_payload(4096 + source.unsigned(13), source.unsigned(14))
    elif what in (fake.STATUS, fake.STATUS_EXT):
        bits = 64 if style == fake.EXTENDED else 32
        extents = [(source.unsigned(bits), source.unsigned(bits)) for _ in range(source.byte() % 9)]
        payload = fake.status_payload(style, source.byte() % 4, extents)
    elif what & 0x8000:
        payload = fake.error_payload(source.byte(), source.bytes(source.byte() % 9), 4096)
    else:
        payload = b""
    offset = source.pick((0, 0, 4096, 65536))
    length = source.unsigned(32) if kind > 230 else None
    return fake.chunk(
        style, cookie, what, payload, done=bool(kind & 1), offset=offset, length=length
    )


def _sound(protocol: Protocol) -> None:
    """See that what is told of a connection's end can be told."""
    assert protocol.failure is None or isinstance(protocol.failure, Error)
    assert str(protocol.dead()).replace("\n", "").isprintable()
    assert all(isinstance(x, Opened | Finished) or x for x in protocol.events_received())


# -- QEMU's monitor, and what lies there


def _replies() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((_DATA / "graph").glob("*.json"))]
    return [moments[name] for moments in found for name in sorted(moments)]


_REPLIES = [(replies, words_of(replies)) for replies in _replies()]


def graph(data: bytes) -> None:
    """The replies of a monitor, recorded and disturbed."""
    source = Source(data)
    replies, words = source.pick(_REPLIES)
    replies = disturbed(replies, source, words)
    if not isinstance(replies, dict) or not {"block", "nodes", "stats", "jobs"} <= replies.keys():
        return
    known = {name: replies[name] for name in Replies.__dataclass_fields__ if name in replies}
    with suppress(Error):
        found = build(Replies(**{"exports": [], **known}))
        for device in found.devices:
            device.describe()
            if device.chain is not None:
                assert device.chain.layers
                _ = device.chain.shape, device.chain.veiled
        with suppress(Error):
            found.device(source.pick(words))


_HOLDER = json.loads(Holder.me(drawing.RUN, job="x", nodes=["y"]).text())
_RECORD = json.loads(
    json.dumps(
        {
            **drawing.record(
                operation="commit",
                pivot=True,
                job=f"qmpblock-{drawing.RUN}-pivot",
                top_file="/i/top",
                base_file="/i/base",
            ).as_json(),
            "format": 1,
        }
    )
)


def _text(document: Any) -> str:
    """Write JSON as a stranger may, surrogates and NaN included."""
    return json.dumps(document, ensure_ascii=False)


def lock(data: bytes) -> None:
    """What a lock says of its holder."""
    source = Source(data)
    if source.byte() < 64:
        said = source.bytes(source.left).decode("utf-8", "surrogateescape")
    else:
        said = _text(disturbed(_HOLDER, source, ["run", "pid", "start", "details", "format"]))
    with suppress(UnreadableError):
        holder = Holder.from_text(said)
        assert str(holder).isprintable()
        assert Holder.from_text(holder.text()) == holder or "NaN" in said
        holder.is_elsewhere()


def record(data: bytes) -> None:
    """A record, as a lock or a journal may hold it."""
    source = Source(data)
    with suppress(UnreadableError):
        found = read_record(disturbed(_RECORD, source, list(_RECORD)))
        assert found.describe().isprintable()
        found.check_journaled()


def journal(data: bytes) -> None:
    """A journal's file."""
    source = Source(data)
    if source.byte() < 64:
        said = source.bytes(source.left)
    else:
        lines = [disturbed(_RECORD, source, list(_RECORD)) if source.byte() & 1 else _RECORD]
        marks = [{"made": "/i/top", "dev": 1, "ino": 2}, {"pivoted": True}, {"x": {}}]
        words = ["made", "dev", "ino", "pivoted"]
        lines += [disturbed(source.pick(marks), source, words) for _ in range(source.byte() % 4)]
        said = "".join(_text(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
        said = said[: len(said) - source.byte() % 8]
    name = f"top.qmpblock-{drawing.RUN}.journal"
    file = JournalFile(OpenDirectory.at(Path("/")), name, -1)  # of no file: the data are given
    with suppress(Error):
        found = Journal.parse(file, said)
        if found is not None:
            _ = found.pivoted, found.made(), found.is_proven([bytes(32)])
            assert found.record.describe().isprintable()


# -- directories of backups


_WHEN = "20261130T110500Z"
_POINT = json.loads(
    json.dumps(
        backuppoints.point(
            _WHEN,
            [
                backuppoints.disk("vd0", f"{_WHEN}-vd0.qcow2", parent="20261130T100500Z-vd0.qcow2"),
                backuppoints.disk("vd1", f"{_WHEN}-vd1.qcow2"),
            ],
        ).as_json()
    )
)
_POINT_WORDS = [*words_of(_POINT), "../x", "/etc/passwd", ".x", "nbd:x", f"{_WHEN}-2", "20261130"]
_BEGUN = {"format": 1, "backups": backuppoints.BACKUPS, "images": [f"{_WHEN}-vd0.qcow2"]}


def backup_point(data: bytes) -> None:
    """A point file, and all that is said and done by what it says."""
    said = _written(data, _POINT, _POINT_WORDS)
    with _directory({f"{_WHEN}.json": said}) as place, open_backups(place) as backups:
        unread = backups.read()
        for error in unread.values():
            assert error.path == place / f"{_WHEN}.json"
            assert str(error).replace("\n", "").isprintable()
        assert len(unread) + len(backups.points) == 1
        for point in backups.points:
            assert point.as_json()["when"] == _WHEN
            json.dumps(list_document(place, backups.points))
            assert all(line.isprintable() for line in said_points(backups.points))
            files = image_names(_WHEN, [one.disk for one in point.disks])
            files += restored_names(point.disks)
            files += [name for one in point.disks for name in (one.file, one.parent) if name]
            for file in files:
                assert os.path.normpath(backups.place(file)) == str(place / file)
            with suppress(Error):
                find_point(backups.points, "2026-11-30T12:00Z")
                for one in point.disks:
                    point.disk(one.disk)
                    for image in images_of(every_image(backups.points), one.file):
                        why_changed(backups, image)
        assert [path.name for path in place.iterdir()] == [f"{_WHEN}.json"]


def backup_begun(data: bytes) -> None:
    """What says that a backup was begun: nothing goes by it that is not of that backup."""
    said = _written(data, _BEGUN, [f"{_WHEN}-vd1.qcow2", "../x", "/etc/passwd", f"{_WHEN}-/../y"])
    others = {"x": b"", "holiday.jpg": b"", f"{_WHEN}-2-vd0.qcow2": b""}
    ours = {f"{_WHEN}-vd0.qcow2": b"", f"{_WHEN}-vd1.qcow2.partial": b""}
    with _directory({f"{_WHEN}.begun": said, **others, **ours}) as place:
        with open_backups(place) as backups, suppress(RecordError):
            assert backups.id == "" or len(backups.id) == 8
            backups.sweep(but="")
        left = {path.name for path in place.iterdir()}
        assert others.keys() <= left
        assert (place.parent / "x").exists()


def _written(data: bytes, document: Any, words: list[str]) -> bytes:
    source = Source(data)
    if source.byte() < 64:
        return source.bytes(source.left)
    return _text(disturbed(document, source, words)).encode("utf-8", "surrogatepass")


@contextmanager
def _directory(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Have these files in a directory, beside which lies x."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name) / "backups"
        place.mkdir()
        for path, content in (
            (place.parent / "x", b""),
            *((place / n, b) for n, b in files.items()),
        ):
            path.write_bytes(content)
        yield place


# -- policies and maps


def policy(data: bytes) -> None:
    """A policy's text, and the YAML under it."""
    text = data.decode("utf-8", "surrogateescape")
    with suppress(RequestError):
        parse_policy(text)
    with suppress(RequestError):
        top = read_mapping(text, "fuzz")
        for key in ("vms", "disks", "a"):
            for read in (top.text, top.size, top.mappings, top.texts):
                with suppress(RequestError):
                    read(key)
        top.finish()


def lockstep(data: bytes) -> None:
    """Two metadata contexts of a server, merged into a map."""
    source = Source(data)
    sizes = [source.pick((4096, 65536, _SIZE, 1 << 62)) for _ in range(1 + source.byte() % 3)]
    builder = NBDMapBuilder(sizes, 0, sizes[0])
    with suppress(Error):
        while builder.remaining and source.left:
            before = builder.next_offset
            builder.feed(_extents(source, 3), _extents(source, len(sizes) + 1))
            assert before < builder.next_offset <= sizes[0]
        found = builder.finish()
        assert found.length == sizes[0]
        assert int(found.lengths.sum()) == sizes[0]


def _extents(source: Source, most: int) -> Any:
    rows = []
    for _ in range(source.byte() % 6):
        flag = source.byte()
        rows.append((source.unsigned(64), flag % (most + 1) if flag < 240 else source.unsigned(64)))
    return np.array(rows, np.uint64).reshape(-1, 2)


_MAP = [
    {"start": 0, "length": 65536, "depth": 0, "present": True, "zero": False, "data": True,
     "offset": 327680},
    {"start": 65536, "length": 65536, "depth": 1, "present": True, "zero": True, "data": False},
    {"start": 131072, "length": 917504, "depth": 0, "present": False, "zero": True, "data": False},
]  # fmt: skip


def maprecords(data: bytes) -> None:
    """The records of `qemu-img map`."""
    source = Source(data)
    formats = source.pick((None, ("qcow2", "raw"), ("raw",)))
    records = disturbed(_MAP, source, ["start", "length", "depth", "offset", "zero"])
    with suppress(RequestError, UnsupportedError):
        found = AllocationMap.from_qemu_img(records, layers=source.pick((1, 2, 3)), formats=formats)
        again = AllocationMap.from_qemu_img(found.to_qemu_img(), layers=found.layers)
        assert again == found.without_reserved()


def copy_target(data: bytes) -> None:
    """The word that names where a copy goes."""
    with suppress(RequestError):
        target = parse_target(data.decode("utf-8", "surrogateescape"))
        if isinstance(target, NBDTarget):
            assert parse_target(str(target)) == target
        else:
            assert isinstance(parse_target(str(target)), PathTarget)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        nbd_wire,
        nbd_handshake,
        nbd_transmission,
        graph,
        lock,
        record,
        journal,
        backup_point,
        backup_begun,
        policy,
        lockstep,
        maprecords,
        copy_target,
    )
}

_POLICY = b"""\
parallel: 2
speed: 100M
vms:
  - address: /run/qmp
    disks:
      - {disk: vd0, backing: independent, allocation: full, keep-free: 5%}
      - disk: vd1
        backing: {base: "@1"}
        allocation: {like: x.raw, format: raw}
        ranges: [{offset: 0, length: 1M+512}]
"""

#: What is worth beginning from, where zeros and noise do not get far.
SEEDS: dict[str, tuple[bytes, ...]] = {
    "copy_target": (
        b"nbds+unix:///e%20x?socket=/run/s&tls-hostname=h",
        b"nbd://[fe80::1%25eth0]:10809/a/b",
        b"./nbd:x",
    ),
    "policy": (_POLICY, b"[" * 64, b"a: &x [*x]\n"),
    "lock": (b"\0" + json.dumps(_HOLDER).encode(),),
    "backup_point": (b"\0" + json.dumps(_POINT).encode(),),
    "backup_begun": (b"\0" + json.dumps(_BEGUN).encode(),),
    "journal": (b"\0" + json.dumps(_RECORD).encode() + b"\n",),
    "nbd_handshake": (bytes([1, 64, 0, 5, 0, 2, 0, 4, 0, 1]), bytes([2, 64, 0, 5, 0, 4, 0, 1])),
}
