"""Where an overlay lies for a while: beside the image, as the VM has it."""

import os
from types import SimpleNamespace

import pytest

from qmpblock.chains.home import home_file, open_home, written
from qmpblock.errors import DisconnectedError, UnsupportedError
from qmpblock.graph.model import Layer, Node
from qmpblock.qemu.connection import Connection, NBDAccess


class Asked(Connection):
    """A VM whose process is this one."""

    def __init__(self, *, gone=False):
        self.gone = gone
        self.commands = []
        monitor = SimpleNamespace(peer_pid=os.getpid(), execute=self.execute)
        super().__init__(monitor, NBDAccess(), 60.0)

    async def execute(self, command):
        self.commands.append(command)
        if self.gone:
            raise DisconnectedError("it is gone")


def layer(path):
    return Layer(0, Node("f", "raw", str(path), 1, False), Node("s", "file", str(path), 1, False))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with path.open():
        yield path


def test_what_its_content_comes_home_to(image):
    assert written(Asked(), layer(image), str(image)) == ((str(image), image.stat().st_ino),)


async def test_an_image_that_is_not(tmp_path):
    vm = Asked()
    (tmp_path / "image").touch()  # but nobody has it open
    with pytest.raises(UnsupportedError, match="beside which an overlay must lie") as caught:
        await home_file(vm, layer(tmp_path / "image"))
    assert caught.value.standing == "nothing was touched"
    assert vm.commands == ["query-status"]


async def test_a_directory_that_is_another_one_by_now(image, tmp_path):
    with await open_home(Asked(), layer(image), str(image)) as directory:
        assert directory.status("image").st_ino == image.stat().st_ino
    moved = image.rename(tmp_path / "moved")
    image.write_bytes(b"another")
    with pytest.raises(UnsupportedError, match="was moved just now"):
        await open_home(Asked(), layer(moved), str(image))


@pytest.mark.parametrize("look", ["home_file", "open_home"])
async def test_a_qemu_that_has_gone_moved_no_image(image, tmp_path, look):
    """Of a process that has ended no open file can be seen: it is said that it has ended."""
    closed = tmp_path / "closed"
    closed.touch()
    vm = Asked(gone=True)
    with pytest.raises(DisconnectedError) as caught:
        await (
            home_file(vm, layer(closed))
            if look == "home_file"
            else open_home(vm, layer(closed), str(closed))
        )
    assert caught.value.standing == "nothing was touched"
