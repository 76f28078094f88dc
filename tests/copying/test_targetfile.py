"""Targets that are files: what a word may mean."""

import os

import pytest

from qmpblock.copying.targetfile import absolute, check_name
from qmpblock.errors import RequestError


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("a", "/here/a"),
        ("./a", "/here/a"),
        ("../b/a", "/b/a"),
        ("/c//a", "/c/a"),
        ("a b", "/here/a b"),
    ],
)
def test_the_path_of_a_file(word, file, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert absolute(word) == file


@pytest.mark.parametrize("word", ["", "a\0b", "http://a/b", "json:{}", "a/", "/a/b/"])
def test_no_path_of_a_file(word):
    with pytest.raises(RequestError, match="path of a"):
        absolute(word)


def test_no_name_that_is_too_long(tmp_path):
    check_name(str(tmp_path), str(tmp_path / (255 * "a")))
    with pytest.raises(RequestError, match=r"is of 256 bytes, and .* takes 255") as caught:
        check_name(str(tmp_path), str(tmp_path / (128 * "\N{COPYRIGHT SIGN}")))
    assert caught.value.standing == "nothing was touched"
    check_name(str(tmp_path / "gone"), str(tmp_path / (256 * "a")))  # which is said elsewhere
