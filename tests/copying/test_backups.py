"""In what pieces backup jobs copy."""

import pytest

from qmpblock.address import parse_address
from qmpblock.copying.backups import performance
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.shape import Shape
from qmpblock.copying.target import NBDTarget

SERVER = NBDTarget(parse_address("tcp:host:10809"), "export")


@pytest.mark.parametrize(
    ("shape", "server", "workers", "chunk"),
    [
        (Shape(), None, 16, 128 << 10),
        (Shape(allocation="like"), None, 16, 64 << 10),  # no zeros beside what is none
        (Shape(cluster=2 << 20), None, 16, 2 << 20),  # QEMU takes no smaller one than a cluster
        (Shape(allocation="like", cluster=2 << 20), None, 16, 2 << 20),
        (Shape(), SERVER, 4, 1 << 20),
    ],
)
def test_few_at_once(shape, server, workers, chunk):
    plan = CopyPlan(None, "/copy", "raw", shape=shape, server=server)
    asked = performance(plan, resumed=False)
    assert asked == {"max-workers": workers, "use-copy-range": False, "max-chunk": chunk}


def test_what_the_kernel_shares_it_shares_in_large_pieces():
    asked = performance(CopyPlan(None, "/copy", "raw", shape=Shape(reflink=True)), resumed=False)
    assert asked == {"max-workers": 16, "use-copy-range": True}


def test_what_is_there_can_be_in_clusters_of_any_size():
    asked = performance(CopyPlan(None, "/copy", "qcow2"), resumed=True)
    assert asked == {"max-workers": 4, "use-copy-range": False, "max-chunk": 2 << 20}
