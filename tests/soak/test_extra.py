"""The extra `qmpblock[libvirt]` as a user installs it, by pip: built on the headers of Debian."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from libvirthost import TRIPLET, make_chain
from unpacked import fetched
from wheels import ROOT, build

pytestmark = [pytest.mark.live, pytest.mark.soak]

HEADERS = f"usr/lib/{TRIPLET}/pkgconfig"


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """Have pkg-config find libvirt's headers, as it does where libvirt-dev is installed."""
    root, why = fetched("libvirt-dev", f"{HEADERS}/libvirt.pc")
    if root is None:
        pytest.skip(f"no libvirt-dev: {why}")
    found = tmp_path / "pkgconfig"
    found.mkdir()
    for path in (root / HEADERS).glob("libvirt*.pc"):
        said = path.read_text().replace("=/usr", f"={root / 'usr'}")
        (found / path.name).write_text(said)
    monkeypatch.setenv("PKG_CONFIG_PATH", str(found), prepend=os.pathsep)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(root / "usr/lib" / TRIPLET), prepend=os.pathsep)


def run(*command):
    """Run a program of an environment: what it finds there, and not what this test has."""
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=alone, check=False)


def install(environment, what):
    """Install by pip; skip the test where what it wants is not to be had."""
    pins = ROOT / "tools/constraints.txt"
    done = run(environment / "bin/python", "-m", "pip", "install", "-c", pins, what)
    if "No matching distribution found" in done.stderr:
        pytest.skip(f"pip finds none here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_libvirts_binding_by_pip(headers, libvirt, vm_dir, tmp_path, qemu_binary):
    """Without it an address of libvirt's says what to install, and with it leads to a domain."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    wheel = build(tmp_path)
    install(environment, wheel)
    libvirt.domain("web", make_chain(vm_dir, qemu_binary), "qcow2", qemu_binary)
    asked = (environment / "bin/qmpblock", "map", libvirt.address("web"), "vda", "--totals")
    done = run(*asked)
    assert done.returncode == 3
    for word in ("python3-libvirt", "pip install 'qmpblock[libvirt]'", "libvirt-dev"):
        assert word in done.stderr
    install(environment, f"{wheel}[libvirt]")
    done = run(
        environment / "bin/python", "-P", "-c", "import libvirt_qemu as q; print(q.__file__)"
    )
    assert Path(done.stdout.strip()).is_relative_to(environment), done.stderr
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    assert "base.qcow2" in done.stdout
