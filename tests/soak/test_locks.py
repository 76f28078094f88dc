"""The locks of files, read beside somebody who locks all the time."""

import os
import subprocess
import sys

import pytest
from imagelocks import lock

from qmpblock.graph.places import FileId
from qmpblock.host import filelocks
from qmpblock.host.filelocks import foreign_users
from qmpblock.host.openfiles import OpenFiles

pytestmark = pytest.mark.soak


def test_locks_are_judged_rightly_beside_who_locks_all_the_time(tmp_path):
    """Which lines come twice is a matter of where a page ends: so many files are looked at."""
    files = [(tmp_path / f"held-{number}").open("w+b") for number in range(60)]
    for file in files:
        for byte in (100, 101, 103, 203):
            lock(file, byte)
    ids = [FileId.of(os.fstat(file.fileno())) for file in files]
    churn = subprocess.Popen([sys.executable, "-c", CHURN, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert churn.stdout.read(1)
        torn = sum(
            filelocks._held(lines, file, (101,)) != 1
            for lines, _ in (filelocks._everybodys() for _ in range(300))
            for file in ids
        )
        assert torn, "no reading was torn: this shows nothing"
        print(f"torn: {torn} of {300 * len(ids)}")
        me = OpenFiles(os.getpid())
        for _ in range(100):
            for file in ids:
                assert foreign_users(me, file) is None
                assert filelocks.written([file])
    finally:
        churn.kill()
        churn.communicate()
        for file in files:
            file.close()


CHURN = """
import fcntl, os, struct, sys, time
files = [os.open(f"{sys.argv[1]}/churn-{n}", os.O_RDWR | os.O_CREAT) for n in range(20)]
os.write(1, b"x")
while True:
    time.sleep(0.0005)
    for kind in (fcntl.F_RDLCK, fcntl.F_UNLCK):
        for file in files:
            for byte in (1, 3, 5):
                fcntl.fcntl(file, 37, struct.pack("hhqqi", kind, 0, byte, 1, 0))  # F_OFD_SETLK
"""
