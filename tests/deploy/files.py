"""What deploy/ says, read for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path("deploy")


def dockerfile() -> list[tuple[str, str]]:
    """The last stage's instructions and their arguments, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    instructions = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in whole]
    last = max(place for place, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def exec_form(instruction: str) -> list[str]:
    """Of ENTRYPOINT, CMD or HEALTHCHECK, whose options are left out."""
    (argument,) = [argument for name, argument in dockerfile() if name == instruction]
    command: list[str] = json.loads(argument[argument.index("[") :])
    return command


def manifests() -> dict[str, Any]:
    """The Kubernetes objects by their kind, of which there is one each."""
    found: dict[str, Any] = {}
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            assert document["kind"] not in found
            found[document["kind"]] = document
    return found


def board() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "glmcompile.json").read_text())
