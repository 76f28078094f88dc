"""The images that a destination is started with: made whole, or not at all."""

import errno
import os

import pytest

from qmpblock.errors import NoRoomError, UnsupportedError
from qmpblock.migration import spawn as module
from qmpblock.migration.launch import Image

SIZE = 1 << 20


@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_an_image_has_host_space_for_every_byte(form, tmp_path):
    for preallocated in (True, False):
        image = Image(str(tmp_path / f"{preallocated}"), form, SIZE, preallocated=preallocated)
        await module._make(image, 60)
        assert (os.stat(image.file).st_blocks * 512 >= SIZE) is preallocated
        assert os.stat(image.file).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoRoomError), (errno.EOPNOTSUPP, UnsupportedError)]
)
async def test_nothing_is_left_of_one_that_cannot_have_it(number, kind, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "keep_size", refuse)
    with pytest.raises(kind, match=os.strerror(number)):
        await module._make(Image(str(tmp_path / "d0"), "raw", SIZE, preallocated=True), 60)
    assert list(tmp_path.iterdir()) == []
