"""What two looks at a side tell apart, by what QEMU says."""

import pytest

from qmpblock.migration.unchanged import _called, _differs, _Has, _is_whole


@pytest.mark.parametrize(
    ("data", "called"),
    [
        ({"device": "rng7", "path": "/machine/peripheral/rng7"}, "rng7"),
        ({"path": "/machine/peripheral-anon/device[3]"}, "/machine/peripheral-anon/device[3]"),
        ({"path": "/machine/peripheral/vd0/virtio-backend"}, None),  # a part of what goes after it
        ({}, None),
    ],
    ids=str,
)
def test_what_has_gone_is_what_somebody_had_plugged_in(data, called):
    event = {"event": "DEVICE_DELETED", "data": data}
    assert _is_whole(event) is (called is not None)
    if called is not None:
        assert _called(event) == called


def test_what_differs_is_said_of_each():
    had = _Has({"vd0": "virtio-blk-pci", "cd0": "ide-cd", "x": "e1000"}, {"cd0": "cd", "f": None})
    assert _differs(had, had) == []
    has = _Has({"cd0": "ide-cd", "x": "rtl8139", "new": "usb-tablet"}, {"cd0": None, "f": "disk"})
    assert set(_differs(had, has)) == {
        "usb-tablet new was plugged in",
        "virtio-blk-pci vd0 was taken out",
        "rtl8139 x was exchanged",
        "the medium of cd0 was taken out",
        "the medium of f was inserted",
    }
    changed = _differs(had, _Has(had.devices, {"cd0": "other", "f": None}))
    assert changed == ["the medium of cd0 was changed"]
    assert _differs(had, _Has(had.devices, {"f": None})) == []  # a drive that has gone is a device
