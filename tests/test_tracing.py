"""The reader of traces, and the judge, which the live tests rely on."""

from pathlib import Path

import pytest
from tracing import Judge, calls_of, parse

JUDGE = Judge(Path("/state"), [Path("/images")], Path("/tmp"), Path("/package"))

MAY_BE = [
    'open("/etc/shadow", O_RDONLY|O_CLOEXEC) = 3</etc/shadow>',
    'openat(AT_FDCWD</root>, "disk", O_RDONLY) = -1 ENOENT (No such file or directory)',
    'openat(AT_FDCWD</root>, "/dev/null", O_RDWR|O_CLOEXEC) = 3</dev/null>',
    'openat(AT_FDCWD</root>, "/state/a.journal", O_WRONLY|O_CREAT|O_EXCL, 0600) = 3</state/a>',
    'openat(5</state>, "a.journal", O_WRONLY|O_CREAT|O_EXCL, 0600) = 3</state/a.journal>',
    'openat(5</images>, "disk", O_RDWR|O_NOFOLLOW|O_NONBLOCK) = 3</images/disk>',
    'openat(5</images>, "disk", O_RDONLY|O_NOFOLLOW|O_NONBLOCK) = 3</images/disk>',
    'openat(5</images>, ".", O_RDONLY|O_DIRECTORY) = 3</images>',
    'openat(AT_FDCWD</root>, "/images/disk", O_RDONLY|O_PATH) = 3</images/disk>',
    'openat(5</images>, ".", O_RDWR|O_TMPFILE, 0600) = 3</images/#12>(deleted)',
    'openat2(5</images>, "disk", {flags=O_RDWR|O_NOFOLLOW, resolve=RESOLVE_BENEATH}, 24) = 3</x>',
    'openat(AT_FDCWD</root>, "/proc/self/fd/7", O_RDWR) = 8</images/disk>',
    'open("/proc/123/fd/7", O_WRONLY) = 8</images/disk>',
    'unlinkat(5</images>, "disk.qmpblock-1", 0) = 0',
    'linkat(AT_FDCWD</>, "/proc/self/fd/3", 5</images>, "new", AT_SYMLINK_FOLLOW) = 0',
    'linkat(3</images/#12>(deleted), "", 5</images>, "new", AT_EMPTY_PATH) = 0',
    'renameat(5</images>, "a", 5</images>, "b") = 0',
    'mkdir("/tmp/qmpblock-12", 0700) = 0',
    'unlink("/tmp/qmpblock-12/nbd") = 0',
    'unlinkat(5</tmp/qmpblock-12>, "nbd", 0) = 0',
    'unlinkat(5</tmp>, "qmpblock-12", AT_REMOVEDIR) = 0',
    'openat(AT_FDCWD</>, "/tmp/zezyipbf", O_RDWR|O_CREAT|O_EXCL|O_NOFOLLOW, 0600) = 7</tmp/z>',
    'unlink("/tmp/zezyipbf") = 0',
    'mkdir("/package/__pycache__", 0777) = 0',
    "fallocate(7</images/disk>, FALLOC_FL_KEEP_SIZE, 0, 65536) = 0",
    "ftruncate(7</memfd:qmpblock>(deleted), 0) = 0",
    "fchmod(7</images/new>, 0644) = 0",
    'bind(4<UNIX:[1]>, {sa_family=AF_UNIX, sun_path="/tmp/qmpblock-12/nbd"}, 110) = 0',
    "bind(4<NETLINK:[1]>, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 0",
]
MAY_NOT_BE = [
    'open("/images/disk", O_RDWR) = 3</images/disk>',
    'creat("/images/disk", 0600) = 3</images/disk>',
    'openat(AT_FDCWD</root>, "disk", O_WRONLY|O_CREAT, 0600) = 3</root/disk>',
    'openat(AT_FDCWD</root>, "/images/j", O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 3</images/j>',
    'openat(AT_FDCWD</root>, "/images/j", O_WRONLY|O_APPEND|O_NOFOLLOW) = -1 ENOENT (No such ...)',
    'openat(AT_FDCWD</root>, "/state/../etc/passwd", O_RDWR) = 3</etc/passwd>',
    'openat(5</images>, "disk", O_RDWR) = 3</etc/passwd>',
    'openat(5</images>, "../etc/passwd", O_RDWR|O_NOFOLLOW) = 3</etc/passwd>',
    'openat(5</elsewhere>, "disk", O_RDWR|O_NOFOLLOW) = 3</elsewhere/disk>',
    'openat(5</images>, ".", O_RDWR|O_NOFOLLOW) = -1 EISDIR (Is a directory)',
    'unlink("/images/disk.qmpblock-1") = 0',
    'unlink("/tmp/other-file") = 0',
    'unlink("/package/errors.py") = 0',
    'unlinkat(5</tmp>, "other", AT_REMOVEDIR) = 0',
    'openat(AT_FDCWD</>, "/tmp/zezyipbf", O_RDWR|O_CREAT, 0600) = 7</tmp/z>',
    'unlinkat(AT_FDCWD</images>, "disk.qmpblock-1", 0) = 0',
    'unlink("/proc/self/fd/3") = -1 EPERM (Operation not permitted)',
    'rename("/images/a", "/images/b") = 0',
    'renameat(5</images>, "a", 6</etc>, "passwd") = 0',
    'link("/proc/self/fd/3", "/images/b") = 0',
    'symlinkat("/etc/passwd", 6</etc>, "a") = 0',
    'mkdir("/images/d", 0700) = 0',
    'mkdir("/tmp/qmpblock-12", 0755) = 0',
    'mkdir("/tmp/other", 0700) = 0',
    'chmod("/images/disk", 0644) = 0',
    'fchmodat(5</images>, "disk", 0644) = 0',
    'lchown("/images/disk", 0, 0) = 0',
    'truncate("/images/disk", 0) = 0',
    "ftruncate(7</etc/passwd>, 0) = 0",
    "fallocate(7</srv/other>, FALLOC_FL_KEEP_SIZE, 0, 65536) = 0",
    'bind(4<UNIX:[1]>, {sa_family=AF_UNIX, sun_path="/images/sock"}, 110) = 0',
    'openat(AT_FDCWD</root>, "/images/disk", O_RDONLY|O_CLOEXEC) = 3</images/disk>',
    'openat(AT_FDCWD</root>, "/images/disk", O_RDONLY|O_NOFOLLOW) = 3</images/disk>',
    'openat(5</images>, "disk", O_RDONLY|O_CLOEXEC) = 3</etc/shadow>',
]


@pytest.mark.parametrize("line", MAY_BE)
def test_what_may_be(line):
    assert JUDGE.complaint(parse(line)) is None


@pytest.mark.parametrize("line", MAY_NOT_BE)
def test_what_may_not_be(line):
    assert line in str(JUDGE.complaint(parse(line)))


def test_strings_are_read_whole():
    call = parse(r'openat(5</a\76, \"b>, "a, \"b\" (c)\303\274\n", O_RDONLY) = 3</x>')
    assert call.text(1) == 'a, "b" (c)ü\n'
    assert call.words == {"O_RDONLY"}
    assert call.result == 3


@pytest.mark.parametrize(
    "line",
    [
        "",
        "+++ exited with 0 +++",
        'openat(AT_FDCWD, "a", O_RDONLY <unfinished ...>',
        "<... openat resumed>) = 3",
        'openat(AT_FDCWD, "a", O_RDONLY',
        'openat(AT_FDCWD, "a, O_RDONLY) = 3',
        'getpid("a") = 3',
    ],
)
def test_a_line_that_is_no_call_is_an_error(line):
    with pytest.raises(ValueError, match=r"no call that is known|without an end"):
        parse(line)


@pytest.mark.parametrize(
    "line",
    [
        'unlink("/images/a"...) = 0',
        "unlink(0x7ffd) = 0",
        'unlinkat(5, "a", 0) = 0',
        "ftruncate(-1, 0) = -1 EBADF (Bad file descriptor)",
    ],
)
def test_what_cannot_be_judged_is_an_error(line):
    with pytest.raises(ValueError, match=r"no whole string|no descriptor"):
        JUDGE.complaint(parse(line))


def test_every_thread_is_read(tmp_path):
    (tmp_path / "trace.1").write_text(MAY_BE[0] + "\n")
    (tmp_path / "trace.2").write_text(MAY_NOT_BE[0] + "\n" + MAY_NOT_BE[1] + "\n")
    lines = [call.line for call in calls_of(tmp_path / "trace")]
    assert lines == [MAY_BE[0], *MAY_NOT_BE[:2]]
