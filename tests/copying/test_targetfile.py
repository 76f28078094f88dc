"""Targets that are files: what a word may mean."""

import os

import pytest

from qmpblock.copying.targetfile import absolute
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
