"""The Ansible collection, by Ansible: three hosts with an sshd each, on each of them a VM."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from collections_of_ansible import HOME
from disturbed import locks, nothing_of_ours, until
from hosts import PORT, CutOffError, another_host

from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

ROOT = HOME.parent
TARGETS = HOME / "tests" / "integration" / "targets"
CHAIN = """\
about: A disk over a template.
images:
  - {size: 8M, content: [write 0 1M 0xaa]}
  - {content: [write 1M 64K 0xbb]}
"""
BACKUPS = r"^appeared: (file: .*/backups/|bitmap: qmpblock-backup-)"
#: What a target changes for good.
CHANGED = {
    "backup": BACKUPS,
    "backup_info": BACKUPS,
    "backup_interrupted": BACKUPS,
    "disk": r"^(disappeared|appeared): (node|edge|open file): ",
    "copy": r"^appeared: file: .*/copy.qcow2$",
    "interrupted": r"^(disappeared|appeared): (node|edge|open file): ",
    "snapshot": r"^(disappeared|appeared): (node|edge|open file|device|file): ",
}
COMMAND = """\
#!/bin/sh
export PYTHONPATH={root} QMPBLOCK_STATE={state} PATH=$PATH:/usr/sbin:/sbin
exec {python} -m qmpblock "$@"
"""


class Control:
    """Where playbooks are run: its own files, and hosts that Ansible reaches by ssh."""

    def __init__(self, place, hosts):
        self.place = place
        self.vms = {}
        self.warned = ""
        self.hosts = {f"host{number}": host for number, host in enumerate(hosts)}
        self.command = place / "qmpblock"
        self.command.write_text(
            COMMAND.format(
                root=ROOT,
                state=os.environ["QMPBLOCK_STATE"],
                python=shlex.quote(sys.executable),
            )
        )
        self.command.chmod(0o755)
        collection = place / "c" / "ansible_collections" / "qmpblock" / "qmpblock"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(HOME)
        names = "".join(
            f"Host {name}\n  HostName {host.there}\n  Port {PORT}\n  User root\n"
            f"  UserKnownHostsFile {host.place}/known\n  IdentityFile {host.place}/user\n"
            for name, host in self.hosts.items()
        )
        self.ssh_config = place / "ssh_config"
        self.ssh_config.write_text(
            names + "Host *\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  StrictHostKeyChecking yes\n  GlobalKnownHostsFile /dev/null\n"
            f"  HostKeyAlgorithms ssh-ed25519\n"
            f"  ControlMaster auto\n  ControlPersist yes\n  ControlPath {place}/s-%n\n"
        )

    @property
    def environment(self):
        """What Ansible's programs are told: nothing of theirs lies outside of this place."""
        return {
            **os.environ,
            "HOME": str(self.place),
            "ANSIBLE_HOME": str(self.place / "a"),
            "ANSIBLE_REMOTE_TEMP": str(self.place / "r"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "c"),
            "ANSIBLE_ROLES_PATH": f"{TARGETS}:{HOME / 'roles'}",
            "ANSIBLE_SSH_ARGS": f"-F {self.ssh_config}",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
            "ANSIBLE_INVENTORY_UNPARSED_FAILED": "1",
            "ANSIBLE_DEPRECATION_WARNINGS": "1",
            "LC_ALL": "C.UTF-8",
        }

    def written(self, name, content):
        path = self.place / name
        path.write_text(yaml.safe_dump(content))
        return str(path)

    async def run(self, program, *words, code=0):
        """Run one of Ansible's programs; return what it printed, its warnings in `warned`."""
        process = await self.start(program, *words)
        out, err = await process.communicate()
        self.warned = err.decode()
        assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
        return out.decode()

    async def inventory(self, path):
        """Return what Ansible makes of an inventory."""

        def plain(found):  # what others have chosen is never taken for a template
            return found.get("__ansible_unsafe", found)

        printed = await self.run("ansible-inventory", "-i", path, "--list")
        return json.loads(printed, object_hook=plain)

    async def start(self, program, *words):
        return await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / program),
            *words,
            cwd=self.place,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def leave(self):
        """End the connections that are kept from one task to the next."""
        for socket in [*self.place.glob("s-*"), *self.place.glob(".ansible/cp/*")]:
            process = await asyncio.create_subprocess_exec(
                *("ssh", "-F", "none", "-S", str(socket), "-O", "exit", "there"),
                stderr=asyncio.subprocess.DEVNULL,
            )
            await process.wait()


@pytest.fixture
async def control(request, vm_dir):
    """Give where playbooks are run, with three hosts; by its parameter with processes of theirs."""
    own = getattr(request, "param", False)
    place = vm_dir / "p"
    place.mkdir(mode=0o700)
    async with contextlib.AsyncExitStack() as stack:
        hosts = []
        for which in range(3):
            try:
                host = await stack.enter_async_context(
                    another_host(vm_dir / f"h{which}", which, own_processes=own)
                )
                await host.serve_ssh()
            except CutOffError as error:
                pytest.skip(str(error))
            hosts.append(host)
        made = Control(place, hosts)
        try:
            yield made
        finally:
            await made.leave()


@pytest.fixture
async def vms(control, start_qemu, vm_dir, qemu_binary):
    """Give a VM for each host, as Ansible's inventory has it."""
    found = {}
    for name, host in control.hosts.items():
        images = vm_dir / f"images-{name}"
        built = await build(parse_scenario(CHAIN, "text"), images, Tools.of(qemu_binary))
        program = host.program(qemu_binary) if host.own_processes else qemu_binary
        vm = control.vms[name] = await start_qemu(built, qemu=program)
        (device,) = [one["qdev"] for one in await vm.execute("query-block") if one.get("qdev")]
        found[name] = {
            "qmpblock_address": vm.monitor_path,
            "qmpblock_disk": device.split("/")[3] if device.startswith("/") else device,
            "qmpblock_directory": str(images),
            "qmpblock_executable": str(control.command),
            "ansible_python_interpreter": sys.executable,
        }
    return found


#: Twice five seconds, in which a monitor that is held does not greet.
LONG = {"backup_interrupted", "interrupted"}


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(path.name, marks=[pytest.mark.soak] * (path.name in LONG))
        for path in sorted(TARGETS.iterdir())
    ],
)
async def test_a_target(target, control, vms, invariant):
    """A module does its work once, on all hosts at once, as it said before."""
    if target in CHANGED:
        invariant.expect(CHANGED[target])
    inventory = control.written("hosts.yml", {"all": {"hosts": vms}})
    play = {"hosts": "all", "gather_facts": False, "roles": [target]}
    playbook = control.written("play.yml", [play])
    print(await control.run("ansible-playbook", "-i", inventory, playbook))
    assert "DEPRECATION" not in control.warned


def copied(place):
    """Copy the collection to where ansible-test takes it for one; return that directory."""
    home = place / "t" / "ansible_collections" / "qmpblock" / "qmpblock"
    shutil.copytree(HOME, home, ignore=shutil.ignore_patterns("__pycache__", "output"))
    return home


@pytest.mark.soak
async def test_by_ansibles_own_runner(control, vms, invariant):
    """As whoever changes the collection runs the targets: from a copy of it, host by host."""
    invariant.expect(BACKUPS)
    home = copied(control.place)
    for name, host in control.hosts.items():
        settings = {key: value for key, value in vms[name].items() if key.startswith("qmpblock_")}
        (home / "tests/integration/integration_config.yml").write_text(yaml.safe_dump(settings))
        python = f"{sys.version_info.major}.{sys.version_info.minor}@{sys.executable}"
        process = await asyncio.create_subprocess_exec(
            *(Path(sys.executable).with_name("ansible-test"), "integration", "disk_info", "backup"),
            *("--allow-unsupported", "--controller", f"origin:python={python}"),
            *("--target", f"ssh:root@{host.there}:{PORT},python={python}"),
            cwd=home,
            env={**control.environment, "PATH": f"{host.place}/bin:{os.environ['PATH']}"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        assert out.decode().count("failed=0") == 2


#: In place of the one that ansible-test would download: the pip that Python brings along.
PIP = "import ensurepip\n\nensurepip.bootstrap(upgrade=True, default_pip=True)\n"


def runs(python):
    """Whether it is one: a shim of pyenv's is in the path, and may lead to none."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def only_what_runs(path):
    """Leave out the directories of a PATH in which a Python is that does not run."""
    return ":".join(
        place
        for place in path.split(":")
        if all(map(runs, Path(place).glob("python3.[0-9]*[0-9]")))
    )


@pytest.mark.soak
def test_by_ansibles_own_checks(vm_dir):
    """All of ansible-test's sanity, by each Python here; its tools are those that pip finds."""
    from ansible_test._internal.python_requirements import get_venv_packages

    place = vm_dir / "p"
    place.mkdir()
    home = copied(place)
    cache = place / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True)
    version = get_venv_packages(SimpleNamespace(version="3.11"))["pip"]
    (cache / f"get_pip_{version.replace('.', '_')}.py").write_text(PIP)
    programs = Path(sys.executable).parent
    done = subprocess.run(
        [programs / "ansible-test", "sanity", "--color", "no"],
        cwd=home,
        env={
            **Control(place, []).environment,
            "PATH": f"{programs}:{only_what_runs(os.environ['PATH'])}",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)  # what it skipped, and why
    missing = re.search(r"^ERROR: (No matching distribution found.*)$", done.stdout, re.MULTILINE)
    if missing is not None:
        pytest.skip(f"a tool of ansible-test's is not to be had: {missing[1]}")
    assert done.returncode == 0, done.stdout
    ran = set(re.findall(r'^Running sanity test "(.*?)"', done.stdout, re.MULTILINE))
    assert {"ansible-doc", "changelog", "import", "pep8", "pylint", "validate-modules"} <= ran


@pytest.mark.soak
async def test_what_ctrl_c_leaves_on_a_host(control, vms, invariant):
    """It is at work there, until the next playbook ends it, which then does what is wanted."""
    invariant.forget(control.vms["host0"])  # its chain is another one then
    words = {
        "address": "{{ qmpblock_address }}",
        "disk": "{{ qmpblock_disk }}",
        "executable": "{{ qmpblock_executable }}",
        "backing": "independent",
    }

    def playbook(name, **more):
        task = {"qmpblock.qmpblock.disk": {**words, **more}}
        play = {"hosts": "host0", "gather_facts": False, "tasks": [task]}
        inventory = control.written("hosts.yml", {"all": {"hosts": vms}})
        return ("ansible-playbook", "-i", inventory, control.written(name, [play]))

    process = await control.start(*playbook("begin.yml", speed="4K"))
    vm = control.vms["host0"]

    async def works():  # on the disk: what only looks has a lock for a moment, too
        return any(name.startswith("qmpblock-disk-") for name in await locks(vm))

    await until(works, "a run at work")
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode
    assert await locks(vm)
    out = await control.run(*playbook("end.yml", end_running=True))
    assert "which stood in the way" in control.warned
    assert "changed=1" in out
    await nothing_of_ours(vm)


def plays_of_the_page(directory):
    """Return the plays of docs/ansible.md that are of backups, by name, with theirs in another."""
    page = (ROOT / "docs" / "ansible.md").read_text().replace("/srv/backups", str(directory))
    found = {}
    for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for play in yaml.safe_load(text):
            if isinstance(play, dict) and "name" in play and "tasks" in play:
                found[play["name"]] = play
    return found


async def test_every_night(control, vms, vm_dir, invariant):
    """As the page has it: one host fails, one is not there; the others have their backups."""
    directory = vm_dir / "b"
    (directory / "host1").mkdir(parents=True)
    (directory / "host1" / "letter").write_text("Somebody else's.")
    plays = plays_of_the_page(directory)
    plays["Nightly"]["tasks"][0]["poll"] = 1
    program = {"executable": str(control.command)}
    for play in plays.values():
        del play["become"]  # the sshd is root's, and sudo need not be here
        play["module_defaults"] = {"group/qmpblock.qmpblock.qmpblock": program}
    gone = {"ansible_host": "nowhere.invalid", "qmpblock_address": "/no.qmp"}
    source = {"qmpblock_vms": {"hosts": {**vms, "host3": gone}}}
    words = ("-i", control.written("hosts.yml", source))
    nightly = control.written("nightly.yml", [plays["Nightly"]])
    out = await control.run("ansible-playbook", *words, nightly, code=2)
    assert "DEPRECATION" not in control.warned
    await invariant.verify(control.vms["host1"])
    invariant.expect(r"^appeared: bitmap: qmpblock-backup-")
    report = json.loads((control.place / "report.json").read_text())
    said = {host: one.get("msg", "") for host, one in report.items()}
    assert [host for host, one in report.items() if one.get("failed")] == ["host1"], said
    for host in ("host0", "host2"):
        (image,) = report[host]["images"]
        assert (image["kind"], Path(image["file"]).parent) == ("full", directory / host)
    assert report["host1"]["rc"] == 2
    assert "holds no backups, but other things, such as letter" in report["host1"]["msg"]
    assert report["host1"]["msg"].splitlines()[0] in out
    assert report["host3"]["unreachable"]
    weekly = plays["Weekly"]
    weekly["hosts"] = "host0"
    weekly["environment"] = {"PATH": f"{control.place}:{os.environ['PATH']}"}
    words = (*words, "-e", f"restore_to={vm_dir / 'b' / 'restored'}")
    await control.run("ansible-playbook", *words, control.written("weekly.yml", [weekly]))
    assert (directory / "restored" / f"{vms['host0']['qmpblock_disk']}.qcow2").is_file()


@pytest.mark.parametrize("control", [True], indirect=True)
async def test_the_inventory(control, vms):
    """What three hosts tell, each of them of its own VM alone, and a fourth does not."""
    source = {
        "plugin": "qmpblock.qmpblock.vms",
        "hosts": [*control.hosts, "nowhere.invalid"],
        "unreachable": "warn",
        "ssh_args": ["-F", str(control.ssh_config)],
        "executable": str(control.command),
        "groups": {"chained": "qmpblock_disks and qmpblock_disks[0].layers > 1"},
    }
    path = control.written("vms.qmpblock.yml", source)
    told = await control.inventory(path)
    hostvars = told["_meta"]["hostvars"]
    for host, one in vms.items():
        [name] = told[f"on_{host}"]["hosts"]
        assert name.endswith(f"@{host}")
        assert hostvars[name]["qmpblock_address"] == f"unix:{one['qmpblock_address']}"
        assert hostvars[name]["ansible_host"] == host
    assert (
        sorted(told["chained"]["hosts"])
        == sorted(told["qmpblock_vms"]["hosts"])
        == sorted(hostvars)
    )


async def test_a_host_that_cannot_be_asked(vm_dir):
    place = vm_dir / "p"
    place.mkdir()
    control = Control(place, [])
    source = {"plugin": "qmpblock.qmpblock.vms", "hosts": ["localhost"], "executable": "/no/where"}
    path = control.written("vms.qmpblock.yml", source)
    process = await control.start("ansible-inventory", "-i", path, "--list")
    _, err = await process.communicate()
    assert process.returncode
    assert "/no/where" in err.decode()


@pytest.fixture
async def other(host, vm_dir, monkeypatch):
    """Give another host, and where playbooks are run that reach it from this one."""
    try:
        programs = await host.serve_ssh()
    except CutOffError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    place = vm_dir / "p"
    place.mkdir(mode=0o700)
    return Control(place, [])


async def test_a_guest_goes_to_another_host(other, host, begin, land):
    """By the role; told of in check mode, done once, and there when it is asked for again."""
    source = await begin()
    destination = await land(source)
    variables = {
        "migrate_source": source.monitor_path,
        "migrate_destination": f"ssh://root@{host.there}:{PORT}{destination.monitor_path}",
        "migrate_executable": str(other.command),
        "ansible_python_interpreter": sys.executable,
    }
    role = {"role": "qmpblock.qmpblock.migrate"}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False}
    playbook = other.written("play.yml", [{**play, "vars": variables, "roles": [role]}])
    words = ("-i", "localhost,", playbook)
    out = await other.run("ansible-playbook", "--check", *words)
    assert (await source.execute("query-status"))["running"]
    out = await other.run("ansible-playbook", *words)
    assert "changed=1" in out
    assert (await destination.execute("query-status"))["running"]
    out = await other.run("ansible-playbook", *words)
    assert "changed=0" in out
    end = await (await destination.attach_guest()).stop_stress(0)
    assert (end.bad, end.errors) == (0, 0), end
