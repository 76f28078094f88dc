"""A LUKS header is made again where, and only where, QEMU could not time its key derivation."""

import logging

import pytest

from qmpblock import luks
from qmpblock.errors import CommandError, JobError, ToolError

WORDS = "t.luks: Unable to get accurate CPU usage"


def failures(words):
    return [
        ToolError(["qemu-img", "create"], 1, f"qemu-img: {words}\n"),
        JobError("qmpblock-0-create-0", "create", words),
        CommandError("blockdev-create", None, "GenericError", words),
    ]


class Attempts:
    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.made = 0

    async def __call__(self):
        self.made += 1
        if self.outcomes and (error := self.outcomes.pop(0)) is not None:
            raise error


@pytest.mark.parametrize("error", failures(WORDS), ids=lambda error: type(error).__name__)
async def test_it_is_tried_again_and_said(error, caplog):
    attempts = Attempts(error, error)
    with caplog.at_level(logging.WARNING):
        await luks.retried(attempts)
    assert attempts.made == 3
    assert "took 3 attempts" in caplog.text
    assert "accurate CPU usage" in caplog.text


async def test_one_attempt_is_not_worth_a_word(caplog):
    attempts = Attempts()
    await luks.retried(attempts)
    assert attempts.made == 1
    assert not caplog.records


@pytest.mark.parametrize("error", failures(WORDS), ids=lambda error: type(error).__name__)
async def test_it_is_given_up_at_last_and_the_error_says_how_often(error):
    attempts = Attempts(*[error] * (luks.TRIES + 5))
    with pytest.raises(type(error), match=f"{luks.TRIES} attempts, all in vain") as caught:
        await luks.retried(attempts)
    assert attempts.made == luks.TRIES
    assert "11.1" in caught.value.remedy


@pytest.mark.parametrize(
    "error",
    [*failures("No space left on device"), ValueError(WORDS)],
    ids=lambda e: type(e).__name__,
)
async def test_nothing_else_is_tried_again(error):
    attempts = Attempts(error)
    with pytest.raises(type(error)) as caught:
        await luks.retried(attempts)
    assert caught.value is error
    assert attempts.made == 1
