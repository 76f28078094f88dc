"""What was said on all QMP monitors of one QEMU, as that QEMU heard and said it.

QEMU itself writes it, by two of its trace events, into a file in memory that ends with the
process that made it. So whoever is the client is heard, in whichever process, and nobody stands
between it and QEMU: descriptors pass, and the peer is who it is.

What is kept of it has no secrets in it: it is read as JSON, and what cannot be is left out.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["HIDDEN", "QmpLog", "hide", "hide_in_command", "without_stamps"]

HIDDEN = "(hidden)"
"""What stands in a secret's place."""

_MOST = 8 << 20  # bytes in memory, about
_TAIL = 1 << 20  # bytes that are read, from the end
_LINE = 16 << 10  # characters of a message
_WORTH = 6  # characters of a secret from which on it is looked for everywhere
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h

_OPTIONS = {"-D", "-d", "-trace", "--D", "--d", "--trace"}
_STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
# QEMU 7.2: 21479@1795926564.315706:handle_... QEMU 11: 2026-11-29T04:29:25.091488Z handle_...
_MESSAGE = re.compile(
    rf"(?:\d+@(?P<seconds>\d+)\.(?P<micro>\d{{6}}):|(?P<stamp>{_STAMP}) )"
    r"(?P<what>handle_qmp_command|monitor_qmp_respond) mon (?P<monitor>\w+) "
    r"(?:req|resp): (?P<text>.*)"
)
_PASSWORDS = {"password", "passwd", "passphrase", "cookie", "key-data"}
_IN_TEXT = re.compile(
    r"""(?P<before>\b(?:data|password|passwd|passphrase|cookie)=)[^"',\s]+"""
    r"""|(?P<user>//[^/@\s:"]+:)[^/@\s"]+(?=@)"""
)
_SAID = re.compile(
    r"^\s*(object_add\s+secret|(?:set|change)\S*\s+.*(?:password|vnc))", re.IGNORECASE
)


class QmpLog:
    """The log of one QEMU. Give it `arguments` and `descriptors`."""

    def __init__(self) -> None:
        self._file = os.memfd_create("qmp-log")
        self._control = ""  # the harness's monitor, as QEMU calls it
        self._rest: bytes | None = None  # of one that is closed

    @staticmethod
    def can_be(options: Iterable[str]) -> bool:
        """Whether QEMU's log is free: not where the caller's options use it."""
        return _OPTIONS.isdisjoint(options)

    @property
    def descriptor(self) -> int:
        """To be inherited by QEMU."""
        return self._file

    def arguments(self) -> list[str]:
        """Return QEMU's options. Patterns: an event that a QEMU does not have is no error."""
        events = ("-trace", "handle_qmp_comman*", "-trace", "monitor_qmp_respon*")
        return ["-msg", "timestamp=on", *events, "-D", f"/proc/self/fd/{self._file}"]

    def begin(self) -> None:
        """Take who was greeted first for the harness, which has connected and few others can."""
        for line in os.pread(self._file, 8192, 0).decode(errors="replace").splitlines():
            found = _MESSAGE.match(line)
            if found and found["text"].startswith('{"QMP"'):
                self._control = found["monitor"]
                return

    def trim(self) -> None:
        """Give the memory of what is old back, if it is much."""
        if self._rest is not None or os.fstat(self._file).st_blocks * 512 <= _MOST:
            return
        end = os.fstat(self._file).st_size
        libc = ctypes.CDLL(None, use_errno=True)
        length = ctypes.c_longlong(max(0, end - _TAIL))
        libc.fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_longlong(0), length)

    def close(self) -> None:
        """Give the file back; the end of what was said can still be had. Idempotent."""
        if self._rest is None:
            self._rest = self._read()
            os.close(self._file)

    def _read(self) -> bytes:
        if self._rest is not None:
            return self._rest
        end = os.fstat(self._file).st_size
        return os.pread(self._file, _TAIL, max(0, end - _TAIL))

    def lines(self, secrets: Iterable[str] = ()) -> list[str]:
        """Return the messages, oldest first: when, on which monitor, which way, what.

        The harness's monitor is `control`. The others are `A`, `B`, ..., as they come: QEMU does
        not say which socket it is.

        :param secrets: what must not be in it, beside what looks like one.
        """
        known = set(secrets)
        messages = list(_messages(self._read().decode(errors="replace"), known))
        names, unnamed = {self._control: "control"}, iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        lines = []
        for stamp, monitor, way, message in messages:
            if monitor not in names:
                names[monitor] = next(unnamed, "?")
            text = hide(json.dumps(message, ensure_ascii=False), known)
            if len(text) > _LINE:
                text = f"{text[:_LINE]} ... ({len(text)} characters)"
            lines.append(f"{stamp} {names[monitor]} {way} {text}")
        return lines


def _messages(text: str, secrets: set[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield when, the monitor, `>` to QEMU or `<` from it, and the message without secrets."""
    asked: dict[str, list[tuple[object, bool]]] = {}  # per monitor, with whether a secret comes
    spoken_to: set[str] = set()
    for line in text.splitlines():
        found = _MESSAGE.match(line)
        if found is None:
            continue
        try:
            message = json.loads(found["text"])
        except ValueError:
            continue  # cut, or too long for a buffer of QEMU's: who knows what is in it
        if "event" not in message:
            spoken_to.add(found["monitor"])
        waiting = asked.setdefault(found["monitor"], [])
        if found["what"] == "handle_qmp_command":
            way = ">"
            waiting.append((message.get("id"), _asks_for_a_secret(message)))
        else:
            way = "<"
            if "event" in message and found["monitor"] not in spoken_to:
                continue  # nobody has ever been there
            if "event" not in message and _was_asked(waiting, message.get("id")):
                _learn(message.get("return"), secrets)
                message["return"] = HIDDEN
        yield _when(found), found["monitor"], way, _cleaned(message, secrets)


def _when(found: re.Match[str]) -> str:
    if found["stamp"]:
        return found["stamp"]
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(int(found["seconds"]), UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{found['micro']}Z"


def _asks_for_a_secret(message: dict[str, Any]) -> bool:
    arguments = message.get("arguments") or {}
    command = message.get("execute", message.get("exec-oob"))
    if command == "human-monitor-command":
        return (
            re.match(r"\s*qom-get\s.*\b(data|pass\w*)\s*$", str(arguments.get("command-line")))
            is not None
        )
    return command == "qom-get" and _is_secret(arguments.get("property"))


def _is_secret(name: object) -> bool:
    """Whether a property, by its name, may hold a secret."""
    return name == "data" or name in _PASSWORDS


def _was_asked(waiting: list[tuple[object, bool]], given: object) -> bool:
    """Whether the answer with this id is to a question for a secret."""
    for index, (number, secret) in enumerate(waiting):
        if number == given:
            del waiting[index]
            return secret
    return False


def _learn(value: object, secrets: set[str]) -> None:
    if isinstance(value, str) and len(value) >= _WORTH:
        secrets.add(value)


def _cleaned(value: Any, secrets: set[str]) -> Any:
    """Return a message without what is a secret by its place."""
    if isinstance(value, list):
        return [_cleaned(one, secrets) for one in value]
    if not isinstance(value, dict):
        return value
    is_secret = str(value.get("qom-type")).startswith("secret") or _is_secret(value.get("property"))
    cleaned = {}
    for key, one in value.items():
        hidden = key in _PASSWORDS or (is_secret and key in ("data", "value"))
        if hidden and one is not None:
            _learn(one, secrets)
            cleaned[key] = HIDDEN
        elif key == "command-line" and isinstance(one, str):
            said = _SAID.match(one)
            cleaned[key] = f"{said[1]} {HIDDEN}" if said else one
        else:
            cleaned[key] = _cleaned(one, secrets)
    return cleaned


def hide(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without these secrets, and without what looks like one in options."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _WORTH:
            for form in {
                secret,
                json.dumps(secret)[1:-1],
                json.dumps(secret, ensure_ascii=False)[1:-1],
            }:
                text = text.replace(form, HIDDEN)
    return _IN_TEXT.sub(lambda found: (found["before"] or found["user"]) + HIDDEN, text)


def hide_in_command(command: Iterable[str], secrets: Iterable[str] = ()) -> list[str]:
    """Return a command line without the secrets in it."""
    known, words = set(secrets), []
    for word in command:
        try:
            described = json.loads(word) if word.startswith("{") else None
        except ValueError:
            described = None
        if described is not None:
            cleaned = _cleaned(described, known)
            word = json.dumps(cleaned) if cleaned != described else word
        words.append(word)
    return [hide(word, known) for word in words]


def without_stamps(text: str) -> str:
    """Return what QEMU printed without the times that `-msg timestamp=on` puts before it."""
    return re.sub(rf"^{_STAMP} ", "", text, flags=re.MULTILINE)
