"""The public names of qmpblock.testing."""

from __future__ import annotations

import pytest

import qmpblock.testing


def test_every_public_name_can_be_had() -> None:
    for name in qmpblock.testing.__all__:
        assert getattr(qmpblock.testing, name).__name__ == name
    assert dir(qmpblock.testing) == sorted(qmpblock.testing.__all__)


def test_other_names_cannot() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qmpblock.testing.nonsense
