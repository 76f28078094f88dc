"""How a module runs `qmpblock ... --json`, and what it makes of the answer.

The command's exit codes and the documents of docs/schema are all that is relied on: no module
imports qmpblock, whose Python need not be Ansible's.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from ansible_collections.qmpblock.qmpblock.plugins.module_utils import runs

#: Of every module; described in doc_fragments/command.py, as what follows.
OPTIONS = {
    "executable": {"type": "path", "default": "qmpblock"},
    "stall": {"type": "float"},
}
#: Of every module that is about one running VM.
VM = {
    **OPTIONS,
    "address": {"type": "str", "required": True},
    "nbd": {"type": "str"},
    "tls_creds": {"type": "path"},
    "insecure": {"type": "bool", "default": False},
}
#: Of every module that changes something there.
CHANGES = {
    "unmanaged": {"type": "bool", "default": False},
    "end_running": {"type": "bool", "default": False},
}
#: What an exit code of the command says of what has happened.
OUTCOMES = {
    1: "it failed",
    2: "the request is wrong, and nothing was touched",
    3: "the monitor cannot be reached, or not be used",
    130: "it was interrupted, and has undone what it had begun",
}
DONE = (0, 4)  # 4: with a warning that is worth acting on


def shared_words(params):
    """Return the command's words that every module has options for."""
    words = ["--json"]
    for option in ("stall", "nbd", "tls_creds"):
        if params.get(option) is not None:
            words += ["--" + option.replace("_", "-"), str(params[option])]
    if params.get("insecure"):
        words.append("--insecure")
    return words


def changing_words(params):
    """Return the words of those commands that may change a chain, beside those."""
    return ["--unmanaged"] if params["unmanaged"] else []


class Answer:
    """What the command answered.

    `document` is what it printed on stdout, None where that is no JSON; `warnings` are those of
    stderr; `complaint` is what it said in its own words about why it failed.
    """

    def __init__(self, code, out, err):
        self.code = code
        self.err = err
        self.document = _document(out)
        self.warnings = [
            line[len("warning: ") :] for line in err.splitlines() if line.startswith("warning: ")
        ]
        if code in DONE and self.document is None:
            self.complaint = f"it printed no JSON document, though it ended with {code}"
        else:
            self.complaint = _errors_of(self.document) or _complaint(err)

    @property
    def done(self):
        """Whether it did what it was asked for."""
        return self.code in DONE and self.document is not None


def _document(out):
    try:
        return json.loads(out)
    except ValueError:
        return None


def _errors_of(document):
    """Return why some of what a document is about failed, or is not whole; empty for none.

    Of `plan` and `apply` each disk and copy says it, of `backup check` each backup: of many that
    lie on one image its fault is said once.
    """
    if not isinstance(document, dict):
        return ""
    entries = document.get("disks", []) + document.get("copies", [])
    faulty = {}
    for point in document.get("points", []):
        for fault in point.get("faults", []):
            faulty.setdefault(fault, []).append(point["when"])
    return "\n".join(
        [one["error"] for one in entries if one.get("error")]
        + document.get("unread", [])
        + ["{}: {}".format(", ".join(whens), fault) for fault, whens in faulty.items()]
    )


def _complaint(err):
    """Return the last message of stderr, without the lines of progress that came before it."""
    message = []
    for line in err.splitlines():
        for start in ("qmpblock: ", "Error: "):
            if line.startswith(start):
                message = [line[len(start) :]]
                break
        else:
            if message and line.startswith("  "):
                message.append(line.strip())
    return "\n".join(message) or err.strip() or "it said nothing"


class Command:
    """The command, as a module runs it."""

    def __init__(self, module):
        self._module = module
        self.params = module.params
        self._program = module.get_bin_path(module.params["executable"], required=True)

    def run(self, *words):
        """Run it with these words and those that are shared; return what it answered.

        Where it does not do what it was asked for, the module fails, in the command's own words. A
        run of an earlier playbook that stands in the way is named then; with `end_running` it is
        ended instead, and the command run again. Not in check mode.
        """
        answer, found = self._once(words)
        if self.params.get("end_running") and not self._module.check_mode:
            ended = runs.end(found)
            for one in ended:
                self._module.warn(f"ended {one}, which stood in the way")
            if ended:
                answer, found = self._once(words)
        if not answer.done:
            self._fail(words, answer, found)
        for warning in answer.warnings:
            self._module.warn(warning)
        return answer

    @contextlib.contextmanager
    def policy(self, text):
        """Yield the name of a file that holds the text of a policy, and is removed at the end."""
        descriptor, name = tempfile.mkstemp(".yaml", "policy-", self._module.tmpdir)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            yield name
        finally:
            Path(name).unlink()

    def _once(self, words):
        """Return what it answered, and the runs that it had to give way to."""
        line = self._line(words)
        answer = Answer(*self._module.run_command(line, environ_update=runs.MARK))
        return answer, [] if answer.done else runs.in_the_way(answer.code, answer.complaint)

    def _line(self, words):
        return [self._program, *words, *shared_words(self.params)]

    def _fail(self, words, answer, found):
        self._module.fail_json(
            msg="\n".join([f"qmpblock {words[0]}: {answer.complaint}", *runs.said(found)]),
            outcome=OUTCOMES.get(answer.code, f"exit code {answer.code}"),
            rc=answer.code,
            cmd=self._line(words),
            stderr=answer.err,
            document=answer.document,
            running=[one.document() for one in found],
        )
