"""The course of a job, from made-up looks at it. Followed ones: test_job.py."""

from qmpblock.qemu.jobcourse import Course


def look(status, done=0, total=100, **block):
    """Return what QEMU says of a job."""
    return {"status": status, "current-progress": done, "total-progress": total, **block}


def sawtooth():
    return [look("ready", 100 - n, 100) for _ in range(8) for n in (90, 50, 10)]


def add(course, said, now=0.0, *, asked=False, known=0):
    return course.add(said, now, completion_asked=asked, ending=False, errors=known, known=known)


def test_what_the_guest_writes_meanwhile_counts():
    """A total grows by it; so does the time that is left."""
    course = Course(0.0)
    seen = None
    for now in range(5):
        said = look("running", 100 * now, 1000 + 50 * now)
        seen = add(course, said, now)
    assert (seen.rate, seen.written) == (100, 50)
    assert seen.eta == (1200 - 400) / 50
    said = look("running", 500, 2000)
    seen = add(course, said, 5)
    assert seen.written > seen.rate
    assert seen.eta is None


def test_how_it_was_before_a_pivot_was_asked_for_does_not_count():
    """It may be ready for hours, as far behind as ever, until somebody asks it to pivot."""
    course = Course(0.0)
    for now, said in enumerate(sawtooth()):
        add(course, said, now)
    assert course.hopeless(100, 1.0)
    add(course, said, 100, asked=True)
    assert not course.hopeless(100, 1.0)


def test_a_job_that_stands_by_for_a_moment_is_no_nearer():
    """Each map of the disk drains it, and may be seen to have the job stand by."""
    course = Course(0.0)
    for now, said in enumerate(sawtooth()):
        for status in ("ready", "standby", "ready"):
            add(course, {**said, "status": status}, now, asked=True)
    assert course.hopeless(100, 1.0)


OK, FAILED, FULL = ({"io-status": said} for said in ("ok", "failed", "nospace"))


def test_by_what_it_stands():
    for status in ("paused", "standby"):
        for said, failed, full in ((OK, False, False), (FAILED, True, False), (FULL, False, True)):
            course = Course(0.0)
            add(course, look(status, **said), known=1)
            assert (course.failed, course.full) == (failed, full)
    for status in ("running", "ready", "aborting"):  # its other requests are under way
        course = Course(0.0)
        add(course, look(status, **FAILED), known=1)
        assert (course.failed, course.full, course.unexplained) == (False, False, False)


def test_an_error_that_nobody_saw_the_kind_of():
    course = Course(0.0)
    add(course, look("running", **OK, paused=False))
    assert not course.unexplained
    add(course, look("running", **OK, paused=True), known=1)  # it stands in a moment
    assert not course.unexplained
    add(course, look("paused", **OK, paused=True), known=1)
    assert course.unexplained
    assert not course.full
    add(course, look("running", **OK, paused=False), known=1)
    add(course, look("paused", **OK, paused=True), known=1)  # by somebody, later
    assert not course.unexplained


def test_an_error_that_was_seen_is_explained_after_a_cont():
    course = Course(0.0)
    add(course, look("paused", **FULL, paused=True), known=1)
    add(course, look("paused", **OK, paused=True), known=1)
    assert course.full
    assert not course.unexplained
