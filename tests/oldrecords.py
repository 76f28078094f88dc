"""What qmpblock 0.1.0 wrote before its records had a format and a version, as it wrote it."""

RUN = "deadbeef"
JOURNAL = (
    '{"run": "deadbeef", "operation": "commit", "vm": {"name": "vm", "uuid": '
    '"00000000-0000-0000-0000-000000000000", "pid": 0, "start": 0, "boot": "no-such-boot", '
    '"monitor": "unix:/run/vm.qmp"}, "devices": ["/machine/peripheral/vd0/virtio-backend"], '
    '"names": ["vd0"], "locks": ["qmpblock-disk-vd0"], "job": "qmpblock-deadbeef-pivot", '
    '"helpers": [], "pivot": true, "flush": "", "keeper": "", "top": "qmpblock-0badcafe-0", '
    '"base": "disk0", "top_file": "/i/top.qcow2", "base_file": "/i/base.qcow2", '
    '"base_format": "", "leaving": [["qmpblock-0badcafe-0", "/i/top.qcow2"]], "nodes": [], '
    '"files": [], "bitmaps": [], "promotions": [], "merges": [], "throttle": [], '
    '"throttle_group": "", "detect_zeroes": "", "images": ["/i/top.qcow2", "/i/base.qcow2"]}\n'
    '{"pivoted": true}\n'
)
LOCK = (
    '{"run": "deadbeef", "host": "host", "pid": 4194305, "start": 1, "boot": "no-such-boot", '
    '"pids": "pid:[1]", "details": {"record": {"run": "deadbeef", "operation": "commit", "vm": '
    '{"name": "vm", "uuid": "00000000-0000-0000-0000-000000000000", "pid": 0, "start": 0, '
    '"boot": "no-such-boot", "monitor": "unix:/run/vm.qmp"}, "devices": '
    '["/machine/peripheral/vd0/virtio-backend"], "names": ["vd0"], "locks": '
    '["qmpblock-disk-vd0"], "job": "qmpblock-deadbeef-pivot", "pivot": true, "top": '
    '"qmpblock-0badcafe-0", "base": "disk0", "top_file": "/i/top.qcow2", "base_file": '
    '"/i/base.qcow2", "leaving": [["qmpblock-0badcafe-0", "/i/top.qcow2"]], "images": '
    '["/i/top.qcow2", "/i/base.qcow2"]}}}'
)
