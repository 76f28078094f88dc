"""What libvirt hands on of QEMU's answers; the rest is live (tests/live/test_libvirt.py)."""

import pytest

from qmpblock.qemu.libvirtmonitor import _read
from qmpblock.qemu.transport import LostError

#: As libvirt 9.0 gives them.
ANSWERS = [
    ('{"return":{},"id":"libvirt-413"}', {"return": {}, "id": "libvirt-413"}),
    (
        '{"id":"libvirt-412","error":{"class":"CommandNotFound","desc":"no"}}',
        {"id": "libvirt-412", "error": {"class": "CommandNotFound", "desc": "no"}},
    ),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_answers(text, answer):
    assert _read(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", '{"error": 1}', '{"error": {"class": "x"}}', "[" * 10000, "\udcff"],
)
def test_what_is_no_answer(text):
    with pytest.raises(LostError, match="no QEMU sends"):
        _read(text)
