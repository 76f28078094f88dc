"""Who decides where the guest goes on, against a fake QEMU that keeps objects."""

import asyncio
from dataclasses import replace

import pytest
from drawing import RUN, chain
from fake_objects import fake_vm

from qmpblock.changes.record import VMIdentity
from qmpblock.errors import BusyError, RecordError
from qmpblock.migration import arbiter
from qmpblock.migration.states import Side
from qmpblock.names import handover_name

NAME = handover_name(RUN)


async def test_of_two_one_decides(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        source, monitor = Side.SOURCE, vm.monitor
        assert await arbiter.decided(monitor, RUN) is None
        said = await asyncio.gather(*(arbiter.claim(monitor, RUN, one) for one in Side))
        assert said == [source, source]
        assert await arbiter.decided(monitor, RUN) is source


async def test_it_says_where_the_guest_went(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        to = VMIdentity("new", "unknown", 7, 70, "boot", "/new")
        assert await arbiter.went_to(vm.monitor, RUN) is None
        await arbiter.claim(vm.monitor, RUN, Side.DESTINATION, to=to)
        # It names the process, and says no more of it: each byte takes QEMU time.
        assert await arbiter.went_to(vm.monitor, RUN) == replace(to, name="", monitor="")


async def test_where_no_process_is_seen_its_address_names_it(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        to = VMIdentity("new", "unknown", 0, 0, "", "127.0.0.1:4444")
        await arbiter.claim(vm.monitor, RUN, Side.DESTINATION, to=to)
        assert await arbiter.went_to(vm.monitor, RUN) == to


@pytest.mark.parametrize("stopped", [False, True])
async def test_the_mark_says_whether_the_guest_is_to_stay_stopped(tmp_path, stopped):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        await arbiter.mark(vm.monitor, RUN, stopped=stopped)
        await arbiter.mark(vm.monitor, RUN)  # by whoever comes next
        assert await arbiter.decided(vm.monitor, RUN) is Side.DESTINATION
        assert await arbiter.is_stopped(vm.monitor, RUN) is stopped


@pytest.mark.parametrize("stopped", [False, True])
async def test_the_arbiter_says_it_too(tmp_path, stopped):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, _):
        await arbiter.claim(vm.monitor, RUN, Side.DESTINATION, stopped=stopped)
        assert await arbiter.is_stopped(vm.monitor, RUN) is stopped


async def test_what_was_decided_and_taken_away_again_is_not_free(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        await arbiter.claim(vm.monitor, RUN, Side.SOURCE)
        asked = qemu.get

        def get(command, default=None):
            if command == "qom-get":  # the other one is faster
                qemu.objects.pop(NAME, None)
            return asked(command, default)

        qemu.get = get
        with pytest.raises(BusyError, match="has decided meanwhile"):
            await arbiter.claim(vm.monitor, RUN, Side.DESTINATION)
        assert NAME not in qemu.objects


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "side": "left"}'])
async def test_what_cannot_be_read_decides_nothing(tmp_path, text):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu.objects[NAME] = text
        with pytest.raises(RecordError, match="cannot be read"):
            await arbiter.claim(vm.monitor, RUN, Side.DESTINATION)
        assert qemu.objects == {NAME: text}
