"""Drives a `Protocol` without I/O, against the honest answers of fake_server."""

from __future__ import annotations

import struct

import fake_server as fake

from qmpblock.nbd.protocol import Event, Finished, Opened, Protocol, Wanted


def options_in(data: bytes) -> list[tuple[int, bytes]]:
    """Split what a client sent while haggling; its 4 bytes of flags may be in front."""
    found = []
    if not data.startswith(b"IHAVEOPT"):
        data = data[4:]
    while data:
        magic, option, length = struct.unpack_from(">8sII", data)
        assert magic == b"IHAVEOPT"
        found.append((option, data[16 : 16 + length]))
        data = data[16 + length :]
    return found


def sent(protocol: Protocol) -> bytes:
    return b"".join(protocol.data_to_send())


def new(settings: fake.Settings | None = None, **more: object) -> Protocol:
    """Make a protocol that wants what `settings` offer."""
    settings = settings or fake.Settings()
    wanted = Wanted(contexts=tuple(settings.contexts.values()), tls=settings.tls)
    return Protocol(wanted, **more)  # type: ignore[arg-type]


def before(option: int, settings: fake.Settings | None = None, **more: object) -> Protocol:
    """Return a protocol that has just asked `option`, everything before it answered."""
    settings = settings or fake.Settings()
    protocol = new(settings, **more)
    protocol.receive_data(fake.greeting())
    while True:
        ((asked, _),) = options_in(sent(protocol))
        if asked == option:
            return protocol
        protocol.receive_data(fake.answer_option(settings, asked))


def opened(settings: fake.Settings | None = None, **more: object) -> Protocol:
    """Return a protocol with the export open and no event pending."""
    settings = settings or fake.Settings()
    protocol = before(fake.GO, settings, **more)
    protocol.receive_data(fake.answer_option(settings, fake.GO))
    (event,) = protocol.events_received()
    assert isinstance(event, Opened)
    return protocol


def honest_handshake(settings: fake.Settings) -> bytes:
    """Return all that an honest server says up to transmission, to a client of `new`."""
    said = fake.greeting() + fake.answer_option(settings, fake.EXTENDED_HEADERS)
    if settings.style != fake.EXTENDED:
        said += fake.answer_option(settings, fake.STRUCTURED_REPLY)
    if settings.contexts:
        said += fake.answer_option(settings, fake.SET_CONTEXTS)
    return said + fake.answer_option(settings, fake.GO)


def finished(events: list[Event]) -> Finished:
    (event,) = events
    assert isinstance(event, Finished)
    return event
