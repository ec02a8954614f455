"""The example of autoscaling: files that can be read, that fit each other, and name what there is."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_llmd.router.autoscaling import observe
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.settings import RouterSettings, add_arguments, from_args
from vllm_llmd.settings import EngineSettings
from vllm_llmd.testing.clock import FakeClock

EXAMPLE = Path(__file__).parents[2] / "examples/autoscaling"
FILES = sorted(EXAMPLE.glob("*.yaml"))
METRIC = re.compile(r"vllm_llmd_\w+")
ROLES = {"prefill", "decode"}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLE / name).read_text()))


def deployments() -> dict[str, Any]:
    """Containers by the name of their Deployment."""
    found = [each for name in ("router.yaml", "engines.yaml") for each in documents(name)]
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]["containers"][0]
        for each in found
        if each["kind"] == "Deployment"
    }


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    text = Metrics(Fleet(RouterSettings(), FakeClock(), "r")).exposition().decode()
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_names_metrics_that_there_are(path: Path, exposed: set[str]) -> None:
    assert list(yaml.safe_load_all(path.read_text()))
    assert set(METRIC.findall(path.read_text())) <= exposed


@pytest.mark.parametrize("name", ["keda.yaml", "hpa.yaml", "prometheus-adapter.yaml"])
def test_what_is_scaled_by_is_the_desired_replicas(name: str) -> None:
    assert set(METRIC.findall((EXAMPLE / name).read_text())) == {"vllm_llmd_desired_replicas"}


def test_the_documents_name_every_file() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    assert [path.name for path in FILES if f"`{path.name}`" not in readme] == []


def test_keda_scales_each_deployment_by_the_metric_of_its_role() -> None:
    for scaled in documents("keda.yaml"):
        role = scaled["spec"]["scaleTargetRef"]["name"].removeprefix("llmd-")
        [trigger] = scaled["spec"]["triggers"]
        assert f'role="{role}"' in trigger["metadata"]["query"]
        assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "1")
        assert scaled["spec"]["scaleTargetRef"]["name"] in deployments()
    assert {each["metadata"]["name"] for each in documents("keda.yaml")} == {f"llmd-{role}" for role in ROLES}


def test_the_hpa_scales_each_deployment_by_the_metric_of_its_role() -> None:
    for scaled in documents("hpa.yaml"):
        role = scaled["spec"]["scaleTargetRef"]["name"].removeprefix("llmd-")
        [metric] = scaled["spec"]["metrics"]
        assert metric["external"]["metric"]["selector"]["matchLabels"]["role"] == role
        assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
        assert scaled["spec"]["scaleTargetRef"]["name"] in deployments()
    assert {each["metadata"]["name"] for each in documents("hpa.yaml")} == {f"llmd-{role}" for role in ROLES}


def test_queries_select_by_labels_that_the_metric_has() -> None:
    queries = [each["spec"]["triggers"][0]["metadata"]["query"] for each in documents("keda.yaml")]
    selectors = [
        each["spec"]["metrics"][0]["external"]["metric"]["selector"]["matchLabels"] for each in documents("hpa.yaml")
    ]
    used = {label for query in queries for label in re.findall(r"(\w+)=", query)}
    assert used | {label for selector in selectors for label in selector} == set(observe.LABELS)


def test_the_router_starts_with_these_flags() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = from_args(parser.parse_args(deployments()["llmd-router"]["args"]), {})
    assert settings.slo_ttft_ms == 2000


def test_engines_have_our_connector_in_the_role_of_their_deployment() -> None:
    kinds = {"llmd-prefill": "kv_producer", "llmd-decode": "kv_consumer"}
    [service] = [each for each in documents("router.yaml") if each["kind"] == "Service"]
    for name, kind in kinds.items():
        [config] = [each for each in deployments()[name]["args"] if each.startswith("--kv-transfer-config=")]
        told = json.loads(config.partition("=")[2])
        assert (told["kv_connector"], told["kv_role"]) == ("LlmdConnector", kind)
        assert set(told["kv_connector_extra_config"]) <= set(EngineSettings.__struct_fields__)
        host, port = told["kv_connector_extra_config"]["router"].removeprefix("tcp://").split(":")
        assert host == service["metadata"]["name"]
        assert int(port) in [each["port"] for each in service["spec"]["ports"]]


def test_prometheus_scrapes_the_port_of_the_router_s_service() -> None:
    [job] = yaml.safe_load((EXAMPLE / "prometheus-scrape.yaml").read_text())
    [service] = [each for each in documents("router.yaml") if each["kind"] == "Service"]
    ports = {port["name"] for port in service["spec"]["ports"]}
    name, _, port = job["relabel_configs"][0]["regex"].partition(";")
    assert (name, port in ports) == (service["metadata"]["name"], True)
