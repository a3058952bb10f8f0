"""deploy/ agrees with the server: options, ports, routes, variables, metrics, times."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from glmcompile.cli.serve import command
from glmcompile.serve.middleware import OPEN_PATHS
from tests.deploy.files import board, dockerfile, exec_form, manifests
from tests.serve.servers import ServerThread

METRIC = re.compile(r"\b(?:vllm|glmcompile):\w+")


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return manifests()


@pytest.fixture(scope="module")
def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


@pytest.fixture(scope="module")
def exported(tiny_engine: Callable[..., Any]) -> set[str]:
    """Names of every sample of a running server."""
    with ServerThread(tiny_engine("llama").path) as server:
        families = text_string_to_metric_families(server.get("/metrics").text)
        return {sample.name for family in families for sample in family.samples}


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command would be called with. Raises click's error for what it does not know."""
    context: click.Context = command.make_context("serve", list(arguments))
    return context.params


def test_the_image_runs_the_server_as_nobody_in_particular() -> None:
    entry, arguments = exec_form("ENTRYPOINT"), exec_form("CMD")
    assert entry[:2] == ["glmcompile", "serve"]
    params = parsed([*entry[2:], *arguments])
    assert params["engine"] == Path("/engine")
    assert params["host"] == "0.0.0.0"
    instructions = dict(dockerfile())
    assert instructions["EXPOSE"] == str(params["port"])
    assert instructions["USER"].isdigit()
    assert instructions["USER"] != "0"
    (path,) = re.findall(rf"http://127.0.0.1:{params['port']}(/\w+)", instructions["HEALTHCHECK"])
    assert path in OPEN_PATHS


def test_the_pods_arguments_are_options_of_the_command(container: dict[str, Any]) -> None:
    params = parsed([*exec_form("ENTRYPOINT")[2:], *container["args"]])
    assert params["port"] == container["ports"][0]["containerPort"]
    assert str(params["threads"]) == container["resources"]["requests"]["cpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    variables = {option.envvar for option in command.params}
    assert {item["name"] for item in container["env"]} <= variables


def test_there_is_time_to_drain(objects: dict[str, Any], container: dict[str, Any]) -> None:
    grace = parsed(["engine", *container["args"]])["grace"]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > grace + pause


def test_probes_ask_routes_that_need_no_key(
    objects: dict[str, Any], container: dict[str, Any]
) -> None:
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in _PROBES}
    assert {name: probe["path"] for name, probe in asked.items()} == _PROBES
    assert {probe["port"] for probe in asked.values()} == {container["ports"][0]["name"]}
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in OPEN_PATHS
    assert int(annotations["prometheus.io/port"]) == container["ports"][0]["containerPort"]


_PROBES = {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}


def test_the_objects_name_each_other(objects: dict[str, Any], container: dict[str, Any]) -> None:
    deployment = objects["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    scaled = objects["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicaCount"] >= deployment["spec"]["replicas"]
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (engine,) = [m for m in container["volumeMounts"] if m["name"] == "engine"]
    assert engine["mountPath"] == exec_form("ENTRYPOINT")[2]


def test_the_autoscaler_asks_for_a_metric_of_this_model(
    objects: dict[str, Any], container: dict[str, Any], exported: set[str]
) -> None:
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    (name,) = parsed(["engine", *container["args"]])["model_names"]
    assert f'model_name="{name}"' in query
    assert set(METRIC.findall(query)) <= exported


def test_the_board_shows_metrics_that_the_server_has(exported: set[str]) -> None:
    shown = board()
    expressions = [target["expr"] for panel in shown["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        names = METRIC.findall(expression)
        assert names
        assert set(names) <= exported, expression
        assert expression.count("(") == expression.count(")")
    variables = {item["name"] for item in shown["templating"]["list"]}
    used = re.findall(r"\$\{?(\w+)", json.dumps(shown["panels"]))
    assert set(used) - {"__rate_interval"} <= variables
    assert len({panel["id"] for panel in shown["panels"]}) == len(shown["panels"])
