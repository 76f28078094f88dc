"""The error tree: exit codes, words, and the drawing in its docstring."""

import inspect

import pytest

from qmpblock import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.Error)]


def test_every_public_class_is_drawn_in_the_docstring():
    drawn = errors.__doc__
    for cls in CLASSES:
        if not cls.__name__.startswith("_"):
            assert cls.__name__ in drawn


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        ("RequestError", 2),
        ("UnsupportedError", 2),
        ("NotFoundError", 2),
        ("RangeError", 2),
        ("MonitorError", 3),
        ("GreetingError", 3),
        ("DisconnectedError", 3),
        ("CommandError", 1),
        ("NBDError", 1),
        ("BusyError", 1),
        ("InUseError", 2),
    ],
)
def test_exit_codes(cls, code):
    assert getattr(errors, cls).exit_code == code


def test_a_message_says_what_stands_and_what_to_do():
    error = errors.Error("it broke", standing="half is done", remedy="do the rest")
    assert str(error) == "it broke\nhalf is done\nRemedy: do the rest"


def test_command_error_carries_everything():
    error = errors.CommandError("blockdev-add", {"node-name": "x"}, "GenericError", "no \x1b[31m")
    assert error.command == "blockdev-add"
    assert error.description == "no \x1b[31m"
    assert "\x1b" not in str(error)
    assert '{"node-name": "x"}' in str(error)


def test_nbd_request_error_names_the_errno():
    assert "EPERM" in str(errors.NBDRequestError("cache 0+512", 1))
    assert "error 9999" in str(errors.NBDRequestError("cache 0+512", 9999, "odd"))


def test_printable_escapes_and_cuts():
    assert errors.printable("a\n\x07\u202eb") == "a\\n\\x07\\u202eb"
    assert len(errors.printable("x" * 1000)) == 300
    assert errors.printable("\udcff") == "\\udcff"
