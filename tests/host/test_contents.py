"""The bytes of an image, into an empty file, or over what is there."""

import os

import pytest

from qmpblock.host.contents import Contents

PAGE = 4096


@pytest.fixture
def sparse(tmp_path):
    with (tmp_path / "sparse").open("w+b") as file:
        os.pwrite(file.fileno(), b"a" * PAGE, PAGE)
        os.pwrite(file.fileno(), b"b" * PAGE, 1024 * PAGE)
        file.truncate(2048 * PAGE)
        yield file


def test_into_an_empty_file_go_the_pieces_alone(sparse, tmp_path):
    with (tmp_path / "copy").open("w+b") as file:
        Contents.of(sparse.fileno()).write_to(file.fileno())
        assert file.read() == os.pread(sparse.fileno(), 4096 * PAGE, 0)
        assert os.fstat(file.fileno()).st_blocks <= 16 * PAGE // 512


def test_over_what_is_there_go_zeros_too(sparse, tmp_path):
    with (tmp_path / "copy").open("w+b") as file:
        os.pwrite(file.fileno(), b"x" * 2050 * PAGE, 0)
        Contents.of(sparse.fileno()).write_over(file.fileno())
        assert file.read() == os.pread(sparse.fileno(), 4096 * PAGE, 0) + b"x" * 2 * PAGE
