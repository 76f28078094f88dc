"""What a copy can be asked for is one table."""

import inspect
from dataclasses import fields

import pytest

from qmpblock.cli.copy_command import command
from qmpblock.copying.options import CopyOptions, CopyWords, parse_latency
from qmpblock.errors import RequestError
from qmpblock.vm import VM, Disk

NAMES = [one.name for one in fields(CopyOptions)]


def test_the_keywords_are_the_options():
    assert list(CopyWords.__annotations__) == NAMES
    for one in fields(CopyOptions):
        assert CopyWords.__annotations__[one.name].__forward_arg__ == one.type
    assert not CopyWords.__required_keys__


@pytest.mark.parametrize("method", [VM.copy, Disk.copy])
def test_a_signature_names_them_all(method):
    named = inspect.signature(method).parameters
    keywords = [one for one in named.values() if one.kind is one.KEYWORD_ONLY]
    assert [one.name for one in keywords] == NAMES
    assert {one.name: one.default for one in keywords} == vars(CopyOptions())
    assert not any(one.kind is one.VAR_KEYWORD for one in named.values())


def test_the_command_has_them_all():
    options = {word for one in command.params for word in getattr(one, "opts", ())}
    wanted = {f"--{name.replace('_', '-')}" for name in NAMES}
    assert wanted - options == set()


def test_what_they_mean_is_told():
    assert VM.copy.__doc__ is not None
    told = [name for name in NAMES if f":param {name}:" not in VM.copy.__doc__]
    assert told == ["at"]  # the text says that
    assert "(`at=" in VM.copy.__doc__


def test_the_point():
    assert CopyOptions().point == "start"
    assert CopyOptions(at="end").point == "end"
    assert CopyOptions(at="end", pivot=True).point == CopyOptions(pivot=True).point == "pivot"


@pytest.mark.parametrize("latency", [-0.1, float("nan"), float("inf")])
def test_a_latency_that_is_none(latency):
    with pytest.raises(RequestError, match="latency of"):
        CopyOptions(latency=latency)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20", 0.02), ("20ms", 0.02), ("0.5s", 0.5), ("1.5", 0.0015), ("300us", 0.0003)],
)
def test_a_latency_is_of_milliseconds_or_has_its_unit(text, seconds):
    assert parse_latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["0", "-1", "20m", "0ms", "nan", "inf", "1e3", "20 ms", "\u0662", "9" * 5000, "ms", ""]
)
def test_what_is_no_latency(text):
    assert parse_latency(text) is None


def test_a_speed_that_is_none():
    with pytest.raises(RequestError, match="-1 bytes a second"):
        CopyOptions(speed=-1)
