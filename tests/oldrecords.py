"""What older versions wrote, as they wrote it.

JOURNAL and LOCK are of qmpblock 0.1.0, from before its records had a format and a version; what is
about backups is what the first version wrote that made any.
"""

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
BACKUP_LOCK = (
    '{"format":1,"version":"0.1.0","run":"deadbeef","host":"host","pid":4194305,"start":1,"boot":'
    '"no-such-boot","pids":"pid:[1]","details":{"directory":"/b","device":1,"inode":2,"point":'
    '"20261130T110500Z.json","made":[["d0","qmpblock-backup-0123abcd-89efcdab-0"],["d0",'
    '"qmpblock-backup-0123abcd-89efcdab-0-end"]],"before":[["d0",'
    '"qmpblock-backup-0123abcd-00000001-0"],["d0","qmpblock-backup-0123abcd-00000001-0-end"]],'
    '"nodes":["qmpblock-deadbeef-to-0-left"]}}'
)
BACKUP_BEGUN = (
    '{\n "format": 1,\n "version": "0.1.0",\n "backups": "0123abcd",\n "images": [\n  '
    '"20261130T110500Z-vd0.qcow2"\n ]\n}\n'
)
BACKUP_POINT = (
    '{\n "format": 1,\n "version": "0.1.0",\n "backups": "0123abcd",\n "id": "89efcdab",\n "when": '
    '"20261130T110500Z",\n "time": "2026-11-30T11:05:00.250+00:00",\n "vm": {\n  "name": "web",\n  '
    '"uuid": ""\n },\n "disks": [\n  {\n   "disk": "vd0",\n   "path": '
    '"/machine/peripheral/vd0",\n   "size": 67108864,\n   "source": "/i/d0.qcow2",\n   "format": '
    '"qcow2",\n   "file": "20261130T110500Z-vd0.qcow2",\n   "parent": null,\n   "reason": "it was '
    'asked for",\n   "length": 1000,\n   "modified": 1,\n   "digest": '
    '"0000000000000000000000000000000000000000000000000000000000000000",\n   "copied": 10,\n   '
    '"encrypted": false,\n   "bitmap": "qmpblock-backup-0123abcd-89efcdab-0",\n   "persistent": '
    "true\n  }\n ]\n}\n"
)
