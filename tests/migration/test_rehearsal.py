"""A wire that cannot be measured: a migration might go all the same, or would not."""

from __future__ import annotations

from typing import Any, cast

import pytest

from qmpblock.address import TCPAddress
from qmpblock.errors import Error
from qmpblock.migration import rehearsal
from qmpblock.migration.over import Over

NOBODY = cast("Any", None)


async def test_what_does_not_go_by_the_network_that_it_is_to_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: Any) -> Any:
        raise Error("Certificate does not match")

    monkeypatch.setattr(rehearsal, "measure_wire", refuse)
    assert await rehearsal._wire(NOBODY, NOBODY, None) == (None, "Certificate does not match")
    with pytest.raises(Error, match="Certificate") as failed:
        await rehearsal._wire(NOBODY, NOBODY, Over(TCPAddress("10.0.0.2", 10809)))
    assert "nothing was migrated" in str(failed.value)
