"""Why something is refused of a QEMU that has gone, against a fake one."""

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.errors import UNTOUCHED, DisconnectedError, UnsupportedError


def refusal():
    return UnsupportedError("the VM's process cannot be seen", standing=UNTOUCHED)


async def test_what_is_refused_of_a_vm_that_answers_stays_so(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        with pytest.raises(UnsupportedError, match="cannot be seen"):
            async with vm.unless_gone():
                raise refusal()


async def test_what_is_refused_of_one_that_has_gone_is_that_it_has(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu["query-status"] = None  # it closes the connection
        with pytest.raises(DisconnectedError, match="lost during query-status") as caught:
            async with vm.unless_gone():
                raise refusal()
        assert caught.value.standing == UNTOUCHED
