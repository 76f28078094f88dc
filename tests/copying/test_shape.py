"""What a target can be like, and what is refused."""

from dataclasses import replace

import pytest

from qmpblock.copying.shape import Settings, Shape, Use, check_shape, metadata_of
from qmpblock.errors import RequestError, UnsupportedError

FILE = Use("/i/copy", "qcow2", 1 << 30)
RAW = replace(FILE, format="raw")
END = replace(FILE, start=False)
PIVOT = replace(END, pivot=True)
SERVER = replace(RAW, target="nbd://h/t", kind="server")
DEVICE = replace(RAW, target="/dev/d", kind="device")


@pytest.mark.parametrize("use", [FILE, RAW, END, PIVOT, SERVER, DEVICE])
def test_what_is_by_default_can_be_anywhere(use):
    check_shape(Shape(), use)


@pytest.mark.parametrize(
    ("shape", "use", "error", "words"),
    [
        (Shape("fat"), FILE, RequestError, "none of thin, full, like"),
        (Shape("full"), replace(FILE, overlay=True), RequestError, "--layers top"),
        (Shape("like"), SERVER, UnsupportedError, "an NBD server has, it has by itself"),
        (Shape("like"), DEVICE, UnsupportedError, "a block device has by itself"),
        (Shape("like"), replace(FILE, encrypted=True), UnsupportedError, "with its key"),
        (Shape(cluster=4096), RAW, RequestError, "of qcow2 images"),
        (Shape(cluster=256), FILE, RequestError, "power of two"),
        (Shape(cluster=4 << 20), FILE, RequestError, "power of two"),
        (Shape(cluster=3000), FILE, RequestError, "power of two"),
        (Shape(cluster=0), FILE, RequestError, "power of two"),
        (Shape(cluster=512), replace(FILE, size=(128 << 30) + 512), RequestError, "larger ones"),
        (Shape(compress=True), RAW, RequestError, "knows no compression"),
        (Shape(compress=True), END, UnsupportedError, "do not compress"),
        (Shape("full", compress=True), FILE, RequestError, "--allocation full"),
        (Shape("like", compress=True), FILE, RequestError, "--allocation like"),
        (Shape(compress=True), replace(FILE, encrypted=True), UnsupportedError, "unencrypted"),
        (Shape(reflink=True), SERVER, UnsupportedError, "two files of one file system"),
        (Shape(reflink=True), DEVICE, UnsupportedError, "two files of one file system"),
        (Shape(reflink=True), END, UnsupportedError, "mirror reads and writes"),
        (Shape(reflink=True, compress=True), FILE, RequestError, "--compress wants others"),
        (Shape("full", reflink=True), FILE, RequestError, "--allocation full wants others"),
        (Shape(reflink=True), replace(FILE, encrypted=True), UnsupportedError, "a key of its own"),
        (Shape("full"), replace(DEVICE, format="qcow2"), UnsupportedError, "nothing to be reser"),
        (Shape(direct=True), SERVER, UnsupportedError, "no page cache"),
        (Shape(direct=True), PIVOT, UnsupportedError, "cache.direct"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_touched(shape, use, error, words):
    with pytest.raises(error, match=words) as caught:
        check_shape(shape, use)
    assert type(caught.value) is error
    assert caught.value.standing == "nothing was touched"


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        (Shape("full"), FILE),
        (Shape("full"), SERVER),
        (Shape("full"), PIVOT),
        (Shape("full"), DEVICE),
        (Shape("full"), replace(PIVOT, format="raw")),
        (Shape("like"), replace(FILE, overlay=True)),
        (Shape("like"), PIVOT),
        (Shape(cluster=512), replace(FILE, size=128 << 30)),
        (Shape(cluster=2 << 20), PIVOT),
        (Shape(compress=True, direct=True, cluster=4096), replace(FILE, overlay=True)),
        (Shape(direct=True), DEVICE),
        (Shape(reflink=True, direct=True, cluster=4096), replace(FILE, overlay=True)),
    ],
)
def test_what_makes_sense_is_not(shape, use):
    check_shape(shape, use)


def test_what_is_reserved_no_zeros_take_away():
    assert Shape().while_copying(of_view=True) == Settings("unmap", "unmap")
    assert Shape().while_copying(of_view=False) == Settings("unmap", "unmap")
    assert Shape("like").while_copying(of_view=True) == Settings("unmap", "unmap")
    assert Shape("like").while_copying(of_view=False) == Settings("unmap", "off")
    assert Shape("full").while_copying(of_view=True) == Settings("ignore", "on")
    assert Shape("full").while_copying(of_view=False) == Settings("ignore", "off")


def test_a_guest_goes_over_to_what_it_has_wherever_that_is_thin():
    its = Settings("ignore", "on")
    assert Shape().while_moving(its, raw=False) == its
    assert Shape().while_moving(its, raw=True) == Settings("unmap", "on")
    assert Shape("full").while_moving(its, raw=True) == Settings("ignore", "off")
    assert Shape("like").while_moving(its, raw=False) == Settings("unmap", "off")


@pytest.mark.parametrize("cluster", [512, 4096, 64 << 10, 2 << 20])
@pytest.mark.parametrize("size", [0, 1 << 20, 1 << 30, 100 << 30])
def test_the_tables_of_an_image_that_holds_all(size, cluster):
    least = (8 + 2) * -(-size // cluster)
    assert least <= metadata_of(size, cluster) <= least * 1.3 + 16 * cluster + (2 << 20)
