# SPDX-License-Identifier: Apache-2.0
"""The Helm chart, rendered by helm: valid for Kubernetes, and in line with the server that it starts."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from lightllm_backend import chart_schema
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.launch import server, service
from tests.deploy.custom_resources import SPECS, schema_of
from tests.deploy.helm import CHART, DEPLOY, RELEASE, Manifest, helm, read, render, rendered

ROOT = Path(__file__).parents[2]
VALUES = sorted(path.stem for path in (DEPLOY / "helm" / "values").glob("*.yaml"))
EXAMPLES = DEPLOY / "kubernetes"
# The oldest Kubernetes that Chart.yaml allows, and the newest that kubernetes-validate knows.
VERSIONS = ("1.30", "1.37")
# What LeaderWorkerSet adds to the environment of its containers.
OF_LEADER_WORKER_SET = {"LWS_LEADER_ADDRESS": "lightllm-hosts-0.lightllm-hosts.models", "LWS_WORKER_INDEX": "1"}


def one(objects: tuple[Manifest, ...], *kinds: str) -> Manifest:
    [found] = [one for one in objects if one["kind"] in kinds]
    return found


def pods(objects: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """The templates of the pods, by their component."""
    spec = one(objects, "Deployment", "LeaderWorkerSet")["spec"]
    group = spec.get("leaderWorkerTemplate", {})
    templates = [spec["template"]] if "template" in spec else [group["leaderTemplate"], group["workerTemplate"]]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def container(template: Manifest) -> Manifest:
    [found] = template["spec"]["containers"]
    return found


def settings(template: Manifest) -> EngineConfig:
    """What the command of this pod, as the product defines it, makes of the arguments and the environment."""
    main = container(template)
    names = {entry["name"]: entry.get("value", "10.0.0.1") for entry in main.get("env", [])} | OF_LEADER_WORKER_SET
    arguments = [re.sub(r"\$\((\w+)\)", lambda variable: names[variable[1]], text) for text in main["args"]]
    entry_point = yaml.safe_load(re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0])
    python, flag, module, *first = main.get("command", entry_point)
    assert (python, flag) == ("python3", "-m")
    found = importlib.import_module(module)
    command: click.Command = getattr(found, "command", None) or importlib.import_module(f"{module}.__main__").command
    given = command.make_context(module, [*first, *arguments]).params
    known = {name: value for name, value in given.items() if name in EngineConfig.__dataclass_fields__ and value}
    return EngineConfig.build({}, {f"LIGHTLLM_{name.upper()}": value for name, value in known.items()})


def validate(manifest: Manifest) -> None:
    """Raise unless the object is valid: by Kubernetes' schemas of two versions, or a hand-written one."""
    kind = manifest["apiVersion"], manifest["kind"]
    if kind in SPECS:
        jsonschema.Draft202012Validator(schema_of(*kind)).validate(manifest)
        group = manifest["spec"].get("leaderWorkerTemplate", {})
        for template in (group[name] for name in group if name.endswith("Template")):
            validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})
        return
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("values", VALUES)
def test_it_has_no_lint_and_every_object_is_valid(values: str) -> None:
    lint = helm("lint", "--strict", CHART, "--values", DEPLOY / "helm" / "values" / f"{values}.yaml")
    assert lint.returncode == 0, lint.stdout
    for manifest in rendered(values):
        validate(manifest)
        assert manifest["metadata"]["namespace"] == "models"


def test_together_the_values_use_every_template() -> None:
    kinds = {manifest["kind"] for values in VALUES for manifest in rendered(values)}
    assert kinds == {
        "Deployment", "HorizontalPodAutoscaler", "LeaderWorkerSet", "NetworkPolicy", "PodDisruptionBudget",
        "PodMonitor", "Service",
    }  # fmt: skip
    assert len(list((CHART / "templates").glob("*.yaml"))) == len(kinds)


def test_the_validation_notices_a_wrong_field() -> None:
    deployment = one(render(), "Deployment")
    container(deployment["spec"]["template"])["livenessProbe"]["failureTreshold"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="failureTreshold"):
        validate(deployment)


@pytest.mark.parametrize("values", VALUES)
def test_the_arguments_are_settings_of_the_server_and_its_ports_are_the_manifests(values: str) -> None:
    objects = rendered(values)
    template = pods(objects)["server"]
    config = settings(template)
    ports = {port["name"]: port["containerPort"] for port in container(template)["ports"]}
    assert ports == {
        "front": config.openai_port,
        "http": config.http_port,
        "grpc": config.grpc_port,
        "metrics": config.metrics_port,
    }
    assert config.host == "0.0.0.0"
    for port in one(objects, "Service")["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]]
    rules = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule.get("ports", [])} <= set(ports)
    monitors = [manifest for manifest in objects if manifest["kind"] == "PodMonitor"]
    assert all(endpoint["port"] == "metrics" for one in monitors for endpoint in one["spec"]["podMetricsEndpoints"])
    given = yaml.safe_load((DEPLOY / "helm" / "values" / f"{values}.yaml").read_text())["settings"]
    assert {name: getattr(config, name) for name in given} == given


def test_large_and_fractional_numbers_stay_what_they_are() -> None:
    given = {"tp": 1, "shutdown_timeout_s": 0.5, "max_prompt_bytes": 16777216, "max_total_token_num": 1200000}
    config = settings(pods(render(settings=given))["server"])
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("values", VALUES)
def test_a_pod_has_a_gpu_for_each_of_its_ranks(values: str) -> None:
    for template in pods(rendered(values)).values():
        config = settings(template)
        limits = container(template)["resources"]["limits"]
        ranks = config.tp // getattr(config, "nnodes", 1)
        assert limits.get("nvidia.com/gpu", 0) == (0 if config.device == "cpu" else ranks)
        shared = [volume for volume in template["spec"]["volumes"] if volume["name"] == "shared-memory"]
        assert shared[0]["emptyDir"]["medium"] == "Memory"


def test_the_hosts_of_a_replica_meet_at_the_first_one() -> None:
    objects = rendered("two-hosts")
    server, follower = (settings(pods(objects)[name]) for name in ("server", "follower"))
    group = one(objects, "LeaderWorkerSet")
    assert group["spec"]["leaderWorkerTemplate"]["size"] == server.nnodes == follower.nnodes == 2
    assert (server.node_rank, follower.node_rank) == (0, 1)
    assert server.master_addr == "10.0.0.1"  # its own address, which its name may not yet resolve to
    assert follower.master_addr == OF_LEADER_WORKER_SET["LWS_LEADER_ADDRESS"]
    assert (server.master_port, server.tp, server.model_dir) == (follower.master_port, follower.tp, follower.model_dir)
    # The group's own headless Service must not meet the chart's.
    assert group["metadata"]["name"] != one(objects, "Service")["metadata"]["name"]
    [among_themselves] = [rule for rule in one(objects, "NetworkPolicy")["spec"]["ingress"] if "ports" not in rule]
    assert among_themselves["from"][0]["podSelector"] == one(objects, "NetworkPolicy")["spec"]["podSelector"]


@pytest.mark.parametrize("values", VALUES)
def test_selectors_find_the_pods_that_they_mean(values: str) -> None:
    objects = rendered(values)
    labels = {name: template["metadata"]["labels"] for name, template in pods(objects).items()}

    def found(selector: dict[str, str]) -> set[str]:
        assert selector
        return {name for name, of_pod in labels.items() if selector.items() <= of_pod.items()}

    for manifest in objects:
        spec = manifest["spec"]
        match manifest["kind"]:
            case "Service":
                assert found(spec["selector"]) == {"server"}
            case "Deployment" | "PodMonitor":
                assert found(spec["selector"]["matchLabels"]) == {"server"}
            case "PodDisruptionBudget":
                assert found(spec["selector"]["matchLabels"]) == set(labels)
            case "NetworkPolicy":
                assert found(spec["podSelector"]["matchLabels"]) == set(labels)
            case "HorizontalPodAutoscaler":
                target = one(objects, spec["scaleTargetRef"]["kind"])
                assert spec["scaleTargetRef"] == {
                    "apiVersion": target["apiVersion"],
                    "kind": target["kind"],
                    "name": target["metadata"]["name"],
                }
                assert "replicas" not in target["spec"]  # else each upgrade would undo the scaling
    for constraint in pods(objects)["server"]["spec"]["topologySpreadConstraints"]:
        assert found(constraint["labelSelector"]["matchLabels"]) == {"server"}


@pytest.mark.parametrize("values", VALUES)
def test_a_pod_has_time_to_drain_before_it_is_killed(values: str) -> None:
    template = pods(rendered(values))["server"]
    limit = settings(template).shutdown_timeout_s
    pause = container(template)["lifecycle"]["preStop"]["sleep"]["seconds"]
    # Telling the clients, the front's last answers, tritonserver's end, and the guard's work.
    after = service.TELL_SECONDS + service.FRONT_SECONDS + service.STOP_SECONDS + server.CLEAN_UP_SECONDS
    assert template["spec"]["terminationGracePeriodSeconds"] >= pause + limit + after


@pytest.mark.parametrize("values", VALUES)
def test_the_probes_ask_the_model_health_through_the_front(values: str) -> None:
    from lightllm_backend.front.lightllm.router import router
    from lightllm_backend.front.security import OPEN_PATHS

    main = container(pods(rendered(values))["server"])
    probes = {name: main[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    for probe in probes.values():
        asked = probe["httpGet"]
        assert asked["port"] == "front"
        assert any(asked["path"] == route.path and "GET" in route.methods for route in router.routes)
        assert asked["path"] in OPEN_PATHS  # no probe has an API key
    seconds = values_of(values)["startup"]["seconds"]
    until_failed = {name: probe["failureThreshold"] * probe["periodSeconds"] for name, probe in probes.items()}
    assert until_failed["startupProbe"] >= seconds
    assert until_failed["livenessProbe"] >= 2 * seconds  # docs/reliability.md: longer than two loads of the model


def values_of(name: str) -> dict[str, Any]:
    """The chart's values at the top level with those of a file."""
    files = (CHART / "values.yaml", DEPLOY / "helm" / "values" / f"{name}.yaml")
    return {key: value for file in files for key, value in yaml.safe_load(file.read_text()).items()}


@pytest.mark.parametrize("values", VALUES)
def test_no_process_has_more_rights_than_it_needs(values: str) -> None:
    user, group = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    for template in pods(rendered(values)).values():
        spec = template["spec"]
        assert not spec["automountServiceAccountToken"]
        assert spec["securityContext"].items() >= {
            "runAsNonRoot": True, "runAsUser": int(user), "runAsGroup": int(group), "fsGroup": int(group),
        }.items()  # fmt: skip
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for main in [*spec["containers"], *spec.get("initContainers", [])]:
            assert main["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        # docs/security.md: what the server writes.
        written = {mount["mountPath"] for mount in container(template)["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/tmp", "/dev/shm", "/home/lightllm"}
        assert {mount["name"] for mount in container(template)["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


def test_variables_that_kubernetes_adds_are_no_settings() -> None:
    for values in VALUES:
        assert not any(template["spec"]["enableServiceLinks"] for template in pods(rendered(values)).values())
    with pytest.raises(ConfigError, match="LIGHTLLM_PORT"):  # why not
        EngineConfig.build({}, {"LIGHTLLM_PORT": "tcp://10.0.0.1:9000"})


def test_secrets_are_read_from_secrets_and_close_the_ports_without_keys() -> None:
    objects = rendered("tensor-parallel")
    template = pods(objects)["server"]
    [volume] = [volume for volume in template["spec"]["volumes"] if "secret" in volume]
    [mount] = [mount for mount in container(template)["volumeMounts"] if mount["name"] == volume["name"]]
    [item] = volume["secret"]["items"]
    assert settings(template).api_key_file == f"{mount['mountPath']}/{item['path']}"
    assert volume["secret"]["defaultMode"] == 0o440
    assert mount["readOnly"]
    assert [port["name"] for port in one(objects, "Service")["spec"]["ports"]] == ["front"]
    open_to_clients, to_monitoring = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert (open_to_clients["ports"], to_monitoring["ports"]) == ([{"port": "front"}], [{"port": "metrics"}])
    # The token of the Hub is in the environment of the container that fetches the model, and nowhere else.
    template = pods(rendered("download"))["server"]
    [download] = template["spec"]["initContainers"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token"}}} in download[
        "env"
    ]
    assert "env" not in container(template)


def test_the_model_is_fetched_to_where_the_server_looks_for_it() -> None:
    from huggingface_hub.cli.download import download

    template = pods(rendered("download"))["server"]
    [fetching] = template["spec"]["initContainers"]
    program, command, repository, *options = fetching["command"]
    assert (program, command) == ("hf", "download")
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert set(given) <= {name.replace("_", "-") for name in inspect.signature(download).parameters}
    assert given["local-dir"] == settings(template).model_dir == f"/models/{repository}"
    writable = [mount for mount in fetching["volumeMounts"] if mount["mountPath"] in ("/models", "/tmp")]
    assert len(writable) == 2
    assert not any(mount.get("readOnly") for mount in writable)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": {"tp": 1, "shutdown_timeout_s": 30, "tpp": 2}}, "additional properties 'tpp' not allowed"),
        ({"settings": {"tp": 1, "shutdown_timeout_s": 30, "kv_dtype": "int9"}}, "one of 'auto', 'int8'"),
        ({"settings": {"tp": 1, "shutdown_timeout_s": 30, "http_port": 80}}, "additional properties 'http_port'"),
        ({"settings": {"tp": None}}, "missing property 'tp'"),
        ({"hosts": 2}, "settings.tp is 1; allowed: a multiple of hosts, which is 2"),
        ({"model": {"path": "x"}}, "model.path is x; allowed: with model.volume or model.download.repository"),
    ],
)
def test_wrong_values_are_refused_by_helm(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        render(**given)


def test_the_schema_has_the_settings_of_today() -> None:
    text = chart_schema.SCHEMA.read_text(encoding="utf-8")
    assert chart_schema.updated(text) == text, "run: python -m lightllm_backend.chart_schema"


def test_the_chart_is_of_this_version() -> None:
    [version] = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


def test_the_autoscaler_s_metric_is_the_server_s_and_the_adapter_serves_it() -> None:
    from lightllm_backend.triton_server.metrics import Metrics

    backend = MagicMock()
    Metrics(backend, with_engine=True).close()
    exported = {call.kwargs["name"] for call in backend.MetricFamily.call_args_list}
    [metric] = one(rendered("tensor-parallel"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in exported
    [rule] = yaml.safe_load((EXAMPLES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == name
    assert set(re.findall(r'(\w+)!=""', rule["seriesQuery"])) == set(rule["resources"]["overrides"])


def test_the_inference_pool_finds_the_release_s_servers() -> None:
    pool, route = read((EXAMPLES / "inference-pool.yaml").read_text())
    for manifest in (pool, route):
        validate(manifest)
    template = pods(rendered("cpu"))["server"]
    assert pool["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
    assert pool["spec"]["targetPorts"] == [{"number": settings(template).openai_port}]
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    assert backend == {
        "group": pool["apiVersion"].partition("/")[0],
        "kind": pool["kind"],
        "name": pool["metadata"]["name"],
    }
