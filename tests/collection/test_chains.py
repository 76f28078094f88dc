"""Which overlays are still to be made, by what `qmpblock disks` tells."""

import pytest
from collections_of_ansible import part

missing_overlays = part("module_utils.chains").missing_overlays


def disk(name, *files):
    return {
        "device": name,
        "qom_path": f"/machine/peripheral/{name}",
        "root_node": f"{name}-root" if files else None,
        "format_node": f"{name}-node" if files else None,
        "layers": [{"file": file} for file in files],
    }


DISKS = [disk("vd0", "/b", "/a"), disk("vd1", "/link/c"), disk("cd0")]


def real(file):
    return file.replace("/link/", "/")


@pytest.mark.parametrize(
    ("overlays", "missing"),
    [
        ({"vd0": "/b"}, []),
        ({"vd0": "/a"}, []),  # others lie above it by now
        ({"vd0": "/new"}, ["vd0"]),
        ({"vd0": "/c"}, ["vd0"]),  # of another disk
        ({"vd1": "/c"}, []),
        ({"vd0": "/b", "vd1": "/d"}, ["vd1"]),
        ({"cd0": "/x"}, ["cd0"]),
        ({"vd0-node": "/b", "/link/c": "/c"}, []),
        ({"/machine/peripheral/vd0": "/b", "vd1-root": "/d"}, ["vd1-root"]),
        ({"vda": "/b"}, []),  # by a name that the command alone knows
        ({"vda": "/d"}, ["vda"]),
    ],
)
def test_what_is_missing(overlays, missing):
    assert missing_overlays(DISKS, overlays, real) == missing
