# SPDX-License-Identifier: Apache-2.0
"""The dashboard, the alerts and the compose file against the metric table and the settings; promtool has its say, too.

On Debian and Ubuntu promtool is in the package prometheus.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightllm_backend.config import EngineConfig
from lightllm_backend.triton_server.metric_table import METRICS, PREFIX, samples

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "lightllm.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# What Prometheus itself adds, and what the target's address makes.
TARGET_LABELS = {"instance", "job", "le"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


def dashboard_expressions() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [one.replace("$__rate_interval", "1m").replace("$instance", ".*") for one in found]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def documented_expressions() -> list[str]:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    return [one for one in re.findall(r"`([^`\n]+)`", text) if "rate(" in one]


def promtool(*arguments: object) -> str:
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *alert_expressions(), *documented_expressions()])
def test_an_expression_names_metrics_labels_and_values_of_the_table(expression: str) -> None:
    names = set(re.findall(r"\blightllm_\w+", expression))
    assert names <= samples().keys()
    assert names or expression == 'up{job="lightllm"} == 0'
    allowed: dict[str, set[str]] = {}
    for name in names:
        for label, values in samples()[name].labels.items():
            allowed.setdefault(label, set()).update(values)
    grouped = {label.strip() for one in re.findall(r"by \(([^)]*)\)", expression) for label in one.split(",")}
    assert grouped <= allowed.keys() | TARGET_LABELS
    for label, value in re.findall(r'(\w+)=~?"([^"]*)"', expression):
        assert label in TARGET_LABELS or value in allowed[label]


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(dashboard_expressions())
    assert [name for name in METRICS if not re.search(rf"\b{PREFIX}{name}(_bucket)?\b", shown)] == [
        "request_seconds"  # which depends on what clients ask for
    ]


def test_the_panels_do_not_overlap() -> None:
    cells = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        mine = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not mine & cells, panel["title"]
        cells |= mine
    assert max(column for column, _ in cells) < 24


def test_the_compose_file_fits_together() -> None:
    services = COMPOSE["services"]
    command = services["lightllm"]["command"]
    assert {name.removeprefix("--") for name in command if name.startswith("--")} <= set(
        EngineConfig.__dataclass_fields__
    )
    [job] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "lightllm"
    assert job["static_configs"] == [{"targets": [f"lightllm:{EngineConfig.metrics_port}"]}]
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(published.endswith(f":{port}") for published in services[host]["ports"])
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/lightllm.yml").read_text())["providers"]
    mounts = {}
    for service in services.values():
        for mount in service["volumes"]:
            source_path, target = mount.rsplit(":ro", 1)[0].rsplit(":", 1)
            mounts[target] = source_path
            if source_path.startswith("."):
                assert (DEPLOY / source_path).exists(), mount
            else:
                assert source_path.startswith("${") or source_path in COMPOSE["volumes"], mount
    assert any(target.startswith(provider["options"]["path"] + "/") for target in mounts)
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "nothing asks for a password"
        assert "build" in service or not service["image"].endswith(":latest")


@needs_promtool
def test_the_alerts_fire_when_they_should() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_is_tested() -> None:
    text = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())
    fires = {case["alertname"] for test in text["tests"] for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fires == {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}


@needs_promtool
def test_the_expressions_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"test:expression{number}", "expr": one}
        for number, one in enumerate([*dashboard_expressions(), *documented_expressions()])
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": rules}]}))
    promtool("check", "rules", path)
