"""Which answers of QEMU are read."""

import pytest

from qmpblock.errors import GraphError
from qmpblock.qemu.answers import checked

JOB = {"id": "a", "type": "stream", "status": "running"}


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-jobs", []),
        ("query-jobs", [JOB, JOB | {"error": "x", "more": [None]}]),
        ("query-block", [{"qdev": "a", "inserted": {"x": 1}}, {}]),
        ("query-migrate", {}),
        ("human-monitor-command", ""),
        ("any-other", {"a": [1, None]}),
    ],
)
def test_what_fits_is_returned_as_it_is(command, answer):
    assert checked(command, answer) is answer


@pytest.mark.parametrize(
    ("command", "answer", "words"),
    [
        ("query-jobs", {}, "an object where a list belongs, in query-jobs"),
        ("query-jobs", [1], "a number where an object belongs, in query-jobs"),
        ("query-jobs", [JOB, {}], "no id in query-jobs"),
        ("query-jobs", [JOB | {"id": None}], "nothing where text belongs, in query-jobs, id"),
        ("query-jobs", [JOB | {"error": []}], "a list where text belongs"),
        ("query-block", [{"inserted": "x"}], "text where an object belongs"),
        ("query-status", {"status": "running", "running": 1}, "a number where yes or no belongs"),
        (
            "query-iothreads",
            [{"id": "a", "thread-id": True, "poll-max-ns": 0}],
            "yes or no where a number belongs, in query-iothreads, thread-id",
        ),
        ("human-monitor-command", None, "nothing where text belongs"),
        ("x-debug-query-block-graph", [], "a list where an object belongs"),
    ],
)
def test_what_does_not_is_an_error_that_says_where(command, answer, words):
    with pytest.raises(GraphError, match=words):
        checked(command, answer)
