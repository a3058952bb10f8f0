"""An engine directory is verified when it is opened, and is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from glmcompile.artifact import MANIFEST, Artifact, open_artifact, own_hash, write_manifest
from glmcompile.errors import ArtifactError
from tests.contracts import image_contract

MODEL = image_contract()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A directory with the layout of an engine; its graphs are never run here."""
    output = tmp_path / "engine"
    output.mkdir()
    for component in ("decoder", "vision_encoder"):
        (output / f"{component}.onnx").write_bytes(b"graph")
    (output / "weights.bin").write_bytes(bytes(range(256)) * 16)
    write_manifest(output, MODEL, {"precision": "int8", "required_cpu_features": []})
    return output


def edit(engine: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest as its writer could have written it."""
    manifest = json.loads((engine / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = own_hash(manifest)
    (engine / MANIFEST).write_text(json.dumps(manifest))


def test_an_engine_opens_with_its_model(engine: Path) -> None:
    artifact = open_artifact(engine)
    assert isinstance(artifact, Artifact)
    assert artifact.model == MODEL
    assert artifact.components == ("vision_encoder", "decoder")
    assert artifact.size == 2 * 5 + 4096


def test_a_missing_file_is_named(engine: Path) -> None:
    (engine / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin: missing"):
        open_artifact(engine)


def test_a_truncated_file_is_named(engine: Path) -> None:
    with (engine / "weights.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"weights\.bin: 100 bytes where .* 4096"):
        open_artifact(engine, verify=False)


def test_an_altered_byte_is_found(engine: Path) -> None:
    with (engine / "weights.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match=r"weights\.bin: its SHA-256 differs"):
        open_artifact(engine)


def test_a_newer_format_asks_for_an_upgrade(engine: Path) -> None:
    edit(engine, lambda manifest: manifest.update(format_version=99))
    with pytest.raises(ArtifactError, match=r"format 99.*upgrade"):
        open_artifact(engine)


def test_a_newer_format_may_have_other_fields(engine: Path) -> None:
    (engine / MANIFEST).write_text('{"format_version": 99}')
    with pytest.raises(ArtifactError, match=r"format 99.*upgrade"):
        open_artifact(engine)


@pytest.mark.parametrize(
    "change",
    [
        {"required_cpu_features": None},
        {"files": {"decoder.onnx": "x"}},
        {"files": {}},
        {"model": {**MODEL.to_json(), "family": "unknown"}},
        {"model": {**MODEL.to_json(), "vision": {"token_id": 9}}},
        {"format_version": "new"},
    ],
)
def test_a_wrong_field_is_damage(engine: Path, change: dict[str, object]) -> None:
    edit(engine, lambda manifest: manifest.update(change))
    with pytest.raises(ArtifactError, match=r"manifest\.json: damaged"):
        open_artifact(engine)


def test_a_manifest_altered_by_hand_is_refused(engine: Path) -> None:
    text = (engine / MANIFEST).read_text()
    (engine / MANIFEST).write_text(text.replace('"precision": "int8"', '"precision": "fp32"'))
    with pytest.raises(ArtifactError, match=r"manifest\.json: its SHA-256 differs"):
        open_artifact(engine, verify=False)


def test_a_missing_cpu_feature_is_named(engine: Path) -> None:
    edit(engine, lambda manifest: manifest.update(required_cpu_features=["warp_drive"]))
    with pytest.raises(ArtifactError, match="warp_drive"):
        open_artifact(engine)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 4}'])
def test_a_damaged_manifest_is_named(engine: Path, text: str) -> None:
    (engine / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: damaged"):
        open_artifact(engine)


def test_what_is_not_an_engine_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such engine directory"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="not an engine"):
        open_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="it is a checkpoint"):
        open_artifact(tmp_path)
