"""A second client of a VM, as a manager or an exporter is one: it asks, and asks again."""

import contextlib
import json
import socket
import threading

#: What asks QEMU for all that it knows of its block nodes.
QUERIES = ("query-named-block-nodes", "query-block", "query-block-jobs")


class Poller(contextlib.AbstractContextManager):
    """Asks by a monitor of its own, without a pause, in a thread: no work of ours delays it."""

    def __init__(self, path, queries=QUERIES[:1]):
        self.count = 0
        self._messages = [json.dumps({"execute": one}).encode() + b"\n" for one in queries]
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        with (
            socket.socket(socket.AF_UNIX) as sock,
            contextlib.suppress(OSError),  # QEMU has ended: the test sees that itself
        ):
            sock.connect(self._path)
            lines = sock.makefile("rb")
            lines.readline()
            self._ask(sock, lines, b'{"execute": "qmp_capabilities"}\n')
            while not self._over.is_set():
                for message in self._messages:
                    if not self._ask(sock, lines, message):
                        return
                    self.count += 1

    def _ask(self, sock, lines, message):
        sock.sendall(message)
        while line := lines.readline():
            if not line.startswith(b'{"timestamp"'):  # no event
                return line
        return b""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()
