"""Figures in Prometheus's text format: parsed back, and those that the page and its files name."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from unpacked import fetched

from qmpblock.graph.model import JobInfo
from qmpblock.metrics.figures import DiskFigures, LayerFigures, VMFigures
from qmpblock.metrics.text import METRICS, figures_of, job_figures, rendered, room_figures

DOCS = Path(__file__).parents[2] / "docs"
ALERTS = DOCS / "qmpblock-alerts.yml"
LAYERS = (LayerFigures(0, 3 << 20, 65536, 4096), LayerFigures(1, 1 << 50, 0, 0))
DISK = DiskFigures("vd0", 1 << 51, LAYERS, 1 << 50, 7, 1 << 40, 0.25, None, "vda")
BARE = DiskFigures('v"d\n\\1', 0, None, None, None, None, None, None)
UNMAPPED = DiskFigures("vd2", 512, None, None, None, None, None, "somebody has the server")


def job(name):
    return JobInfo(id=name, type="backup", status="running", current=5, total=9, error=None)


def parsed(figures):
    """Return the value of each sample, by its name and labels."""
    found = {}
    for family in text_string_to_metric_families(rendered(figures)):
        assert family.type == "gauge"
        assert family.documentation == METRICS[family.name.removeprefix("qmpblock_")].help
        for one in family.samples:
            key = (one.name, *(f"{name}={value}" for name, value in sorted(one.labels.items())))
            assert key not in found
            found[key] = one.value
    return found


def test_all_that_there_is_of_a_vm():
    vm = VMFigures("a.qmp", True, False, None, 1.5, True, (DISK, BARE, UNMAPPED), (job("j0"),))
    silent = VMFigures("b.qmp", False, True, "another client holds it", 5.0)
    found = parsed(one for vm in (vm, silent) for one in figures_of(vm))
    a, vd0, j0 = "vm=a.qmp", "disk=vd0", "work=j0"
    layer = "qmpblock_disk_layer_bytes"
    strange = 'disk=v"d\\n\\1'  # what a terminal could not show is escaped, once more in the file
    assert found == {
        ("qmpblock_up", a): 1,
        ("qmpblock_up", "vm=b.qmp"): 0,
        ("qmpblock_held", a): 0,
        ("qmpblock_held", "vm=b.qmp"): 1,
        ("qmpblock_look_seconds", a): 1.5,
        ("qmpblock_look_seconds", "vm=b.qmp"): 5,
        ("qmpblock_recovery_needed", a): 1,
        ("qmpblock_disk_info", "called=vda", vd0, a): 1,
        ("qmpblock_disk_info", f"called={strange.removeprefix('disk=')}", strange, a): 1,
        ("qmpblock_disk_info", "called=vd2", "disk=vd2", a): 1,
        ("qmpblock_disk_size_bytes", vd0, a): 1 << 51,
        ("qmpblock_disk_size_bytes", strange, a): 0,
        ("qmpblock_disk_size_bytes", "disk=vd2", a): 512,
        (layer, "depth=0", vd0, "kind=data", a): 3 << 20,
        (layer, "depth=0", vd0, "kind=zero", a): 65536,
        (layer, "depth=0", vd0, "kind=reserved", a): 4096,
        (layer, "depth=1", vd0, "kind=data", a): 1 << 50,
        (layer, "depth=1", vd0, "kind=zero", a): 0,
        (layer, "depth=1", vd0, "kind=reserved", a): 0,
        ("qmpblock_disk_backing_bytes", vd0, a): 1 << 50,
        ("qmpblock_disk_mapped", vd0, a): 1,
        ("qmpblock_disk_mapped", "disk=vd2", a): 0,
        ("qmpblock_map_seconds", vd0, a): 0.25,
        ("qmpblock_room_bytes", vd0, a): 7,
        ("qmpblock_host_free_bytes", vd0, a): 1 << 40,
        ("qmpblock_job_done_bytes", "type=backup", a, j0): 5,
        ("qmpblock_job_total_bytes", "type=backup", a, j0): 9,
    }


def test_what_long_work_tells():
    figures = [
        *job_figures("a", "copy of vd0", "copy", 1, 2, 61.5),
        *room_figures("a", "d", 5, 9, 3),
    ]
    found = parsed(figures)
    work = ("type=copy", "vm=a", "work=copy of vd0")
    assert found == {
        ("qmpblock_job_done_bytes", *work): 1,
        ("qmpblock_job_total_bytes", *work): 2,
        ("qmpblock_job_seconds_since_progress", *work): 61.5,
        ("qmpblock_room_wanted_bytes", "disk=d", "vm=a"): 9,
        ("qmpblock_room_bytes", "disk=d", "vm=a"): 5,
        ("qmpblock_host_free_bytes", "disk=d", "vm=a"): 3,
    }
    told = {name for name, *_ in parsed(room_figures("a", "d", None, 9, None))}
    assert told == {"qmpblock_room_wanted_bytes"}


def test_nothing_is_a_whole_file_too():
    assert rendered(()) == ""


def named(text):
    return {name.removeprefix("qmpblock_") for name in re.findall(r"qmpblock_[a-z_]+", text)}


def test_the_page_has_each_metric_with_its_labels():
    table = (DOCS / "metrics.md").read_text().partition("| metric |")[2].partition("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        names, labels = row.split("|")[1:3]
        found |= {name: tuple(re.findall(r"\w+", labels)) for name in named(names)}
    assert found == {name: one.labels for name, one in METRICS.items()}


def test_every_metric_that_the_alerts_name_exists():
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    assert len(rules) > 4
    for rule in rules:
        metrics = named(rule["expr"])
        assert metrics
        assert metrics <= set(METRICS)
        labels = set.intersection(*(set(METRICS[name].labels) for name in metrics))
        text = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels


def test_every_metric_of_the_dashboard_exists():
    dashboard = json.loads((DOCS / "qmpblock-dashboard.json").read_text())
    expressions = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    assert len(expressions) > 10
    for text in expressions:
        assert named(text), text
        assert named(text) <= set(METRICS)
        for name, labels in re.findall(r"qmpblock_(\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)=", labels)) <= set(METRICS[name].labels)
    legends = [one["legendFormat"] for panel in dashboard["panels"] for one in panel["targets"]]
    every = {label for one in METRICS.values() for label in one.labels}
    assert set(re.findall(r"\{\{(\w+)\}\}", " ".join(legends))) <= every
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert {named(one["definition"]).pop() for one in dashboard["templating"]["list"][1:]} <= set(
        METRICS
    )


def test_every_metric_is_in_the_dashboard_or_in_an_alert():
    shown = named((DOCS / "qmpblock-dashboard.json").read_text()) | named(ALERTS.read_text())
    assert set(METRICS) <= shown, set(METRICS) - shown


SERIES = {
    "QmpblockVMSilent": ('qmpblock_up{vm="a"}', "0x60", "1x60"),
    "QmpblockRecoveryNeeded": ('qmpblock_recovery_needed{vm="a"}', "1x60", "0x60"),
    "QmpblockRoomShort": ('qmpblock_room_bytes{vm="a",disk="d"}', "49x60", "50x60"),
    "QmpblockHostFull": ('qmpblock_host_free_bytes{vm="a",disk="d"}', "3e9-1e7x60", "3e9x60"),
    "QmpblockStalled": (
        'qmpblock_job_seconds_since_progress{vm="a",work="w",type="t"}',
        "0+60x60",
        "50x60",
    ),
    "QmpblockJobStalled": (
        'qmpblock_job_done_bytes{vm="a",work="w",type="t"}',
        "5x60",
        "0+1x60",
    ),
}
BESIDE = {
    "QmpblockRoomShort": 'qmpblock_room_wanted_bytes{vm="a",disk="d"}',
    "QmpblockJobStalled": 'qmpblock_job_total_bytes{vm="a",work="w",type="t"}',
}


def rules_test(promtool, directory, alert, values, *, fires, more=()):
    """Have promtool evaluate an alert over an hour of a series; return what it says, '' if so."""
    series = [{"series": SERIES[alert][0], "values": values}, *more]
    if alert in BESIDE:
        series.append({"series": BESIDE[alert], "values": "100x60"})
    query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    wanted = [{"labels": "{}", "value": 1}] if fires else []
    return evaluated(promtool, directory, series, {query: wanted})


def evaluated(promtool, directory, series, queries):
    """Have promtool evaluate queries after 50 minutes; return what it says, '' if as wanted."""
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [
                    {"expr": query, "eval_time": "50m", "exp_samples": wanted}
                    for query, wanted in queries.items()
                ],
            }
        ],
    }
    file = directory / "test.yml"
    file.write_text(yaml.safe_dump(test))
    command = [promtool, "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def promtool():
    """Return where it is."""
    folder, why = fetched("promtool", "usr/bin/promtool")
    if folder is None:
        pytest.skip(why)
    return str(folder / "usr/bin/promtool")


def test_there_is_a_series_for_each_alert():
    every = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    assert {rule["alert"] for rule in every} == set(SERIES)


@pytest.mark.parametrize("alert", SERIES)
def test_each_alert_fires_and_does_not(alert, promtool, tmp_path):
    _, bad, good = SERIES[alert]
    assert rules_test(promtool, tmp_path, alert, bad, fires=True) == ""
    assert rules_test(promtool, tmp_path, alert, good, fires=False) == ""
    assert rules_test(promtool, tmp_path, alert, good, fires=True) != ""  # it is evaluated at all


def test_a_monitor_that_is_held_is_no_silent_vm(promtool, tmp_path):
    held = {"series": 'qmpblock_held{vm="a"}', "values": "1x60"}
    assert (
        rules_test(promtool, tmp_path, "QmpblockVMSilent", "0x60", fires=False, more=[held]) == ""
    )


def test_a_vm_of_the_same_name_is_another_one_on_another_host(promtool, tmp_path):
    """Both are in the figures of Prometheus, which has `instance` from each host's exporter."""
    up = [{"series": f'qmpblock_up{{vm="a",instance="{host}"}}', "values": "0x60"} for host in "xy"]
    held = {"series": 'qmpblock_held{vm="a",instance="x"}', "values": "1x60"}
    silent = 'ALERTS{alertname="QmpblockVMSilent",alertstate="firing"}'
    found = {f"count by (instance) ({silent})": [{"labels": '{instance="y"}', "value": 1}]}
    assert evaluated(promtool, tmp_path, [*up, held], found) == ""

    series = []
    for number, host in enumerate("xy", 1):
        disk = f'vm="a",disk="d",instance="{host}"'
        for name, labels, value in (
            ("disk_layer_bytes", ',kind="data",depth="0"', 10 * number),
            ("disk_layer_bytes", ',kind="data",depth="1"', 20 * number),
            ("disk_layer_bytes", ',kind="zero",depth="1"', 40),
            ("disk_size_bytes", "", 60),
            ("disk_info", f',called="vd{host}"', 1),
            ("disk_mapped", "", number - 1),
        ):
            series.append({"series": f"qmpblock_{name}{{{disk}{labels}}}", "values": f"{value}x60"})
    dashboard = json.loads((DOCS / "qmpblock-dashboard.json").read_text())
    queries = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    [data] = [one for one in queries if "disk_info" in one]
    [unmapped] = [one for one in queries if "disk_mapped" in one]
    found = {
        data: [
            {"labels": '{vm="a",disk="d",instance="x",called="vdx"}', "value": 0.5},
            {"labels": '{vm="a",disk="d",instance="y",called="vdy"}', "value": 1},
        ],
        unmapped: [
            {"labels": '{vm="a",instance="x"}', "value": 1},
            {"labels": '{vm="a",instance="y"}', "value": 0},
        ],
    }
    shown = {re.sub(r"\$(vm|disk)", ".*", query): wanted for query, wanted in found.items()}
    assert evaluated(promtool, tmp_path, series, shown) == ""


def test_promtool_takes_what_is_written(promtool):
    vm = VMFigures("a.qmp", True, False, None, 1.5, True, (DISK, BARE), (job("j0"),))
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=rendered(figures_of(vm)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
