"""What is taken over of the words that a QEMU was started with."""

from __future__ import annotations

import shlex

import pytest

from qmpblock.migration.options import has_key, joined, objects_of, options, program, sort_out

WORDS = shlex.split(
    "-nodefaults -m 1G --smp 2 -machine pc,usb=off -name guest,process=x"
    " -chardev socket,id=mon0,path=/run/a,server=on,wait=off -mon chardev=mon0,mode=control"
    " -chardev socket,id=ser,path=/run/ser,server=on -serial chardev:ser -S"
    " -qmp unix:/run/q,server=on -drive if=pflash,file=/fw.fd,readonly=on"
    " -drive file=/disk,if=virtio -device virtio-rng-pci -incoming defer -pidfile /p"
    " -runas nobody -object secret,id=k,data=word -object rng-random,id=r,filename=/dev/urandom"
)


def test_what_the_monitor_tells_better_is_left_out():
    kept = sort_out(WORDS, "/there")
    assert kept.words == tuple(
        shlex.split(
            "-nodefaults -m 1G -smp 2 -machine pc,usb=off -name guest,process=x"
            " -chardev socket,id=ser,path=/there/ser,server=on -serial chardev:ser"
            " -drive if=pflash,file=/fw.fd,readonly=on"
        )
    )
    assert kept.notes == ("-runas is left out: it is the source's own",)
    assert kept.missing == ()


def test_a_key_is_not_taken_over():
    words = ["-netdev", "x,password=secret", "-m", "1G", "-fw_cfg", "name=a,string=b"]
    kept = sort_out(words, "/there")
    assert kept.words == ("-m", "1G", "-fw_cfg", "name=a,string=b")
    [said] = kept.missing
    assert "-netdev" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("secret,id=a,data=b", True),
        ('{"qom-type": "secret", "data": "b"}', True),
        ("secret,id=a,file=/b", False),
        ("socket,path=/data", False),
        ("metadata=x", False),
    ],
)
def test_where_a_key_stands(value, key):
    assert has_key(value) is key


def test_pflash_that_is_written_to_is_told_of():
    kept = sort_out(["-drive", "if=pflash,file=/vars.fd"], "/there")
    assert "give it a copy" in kept.notes[0]


def test_objects_by_their_ids():
    words = [*WORDS, "-object", '{"qom-type": "iothread", "id": "io"}']
    assert set(objects_of(words)) == {"k", "r", "io"}


def test_an_image_by_itself_is_a_drive():
    assert list(options(["-usb", "disk.img"])) == [("usb", None), ("drive", "disk.img")]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["/usr/bin/qemu-system-x86_64", "-S"], 1),
        (["ld.so", "--library-path", "/l", "--argv0", "qemu-kvm", "/b/qemu-kvm", "-S"], 6),
        (["/opt/vm", "-S"], 1),
        ([], 0),
    ],
)
def test_a_loader_may_stand_before_the_program(words, found):
    assert program(words) == (tuple(words[:found]), tuple(words[found:]))


def test_a_shell_reads_what_is_written():
    words = ["qemu", "-name", "a b", "-device", '{"id": "it\'s"}', "-S"]
    assert shlex.split(joined(words).replace("\\\n", "")) == words
    assert "\x1b" not in joined(["qemu", "-name", "\x1b[2J'"])
