"""Targets that are files: what a word may mean, and which names can be had."""

import os

import pytest

from qmpblock.copying import targetname
from qmpblock.copying.targetname import absolute, check_file, check_name
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


@pytest.mark.parametrize("pivots", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_what_another_copy_left_is_not_lost(pivots, force, tmp_path, monkeypatch):
    monkeypatch.setattr(targetname, "sees_directory", lambda _pid, _folder: None)
    target = tmp_path / "t"
    (tmp_path / "t.partial").touch()
    words = {"force": force, "keeps_name": pivots}
    if force and not pivots:
        check_file(None, str(target), **words)
    else:
        with pytest.raises(
            RequestError, match="exists already: a copy that is not whole"
        ) as caught:
            check_file(None, str(target), **words)
        assert "--resume" in caught.value.remedy
    check_file(None, str(target), resume=True, **words)
