"""The engine directory: its manifest, and how it is verified on opening.

Layout: one graph per component (`<component>.onnx`), `weights.bin` (external data of all graphs),
the tokenizer's files, and `manifest.json`, which lists every other file with its SHA-256 and ends
with its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmcompile.contract import Contract
from glmcompile.errors import ArtifactError

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
OWN_HASH = "sha256"  # the manifest's entry for itself
WEIGHTS = "weights.bin"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
PIECE = 64 << 20  # bytes of a file that are hashed together
_BLOCK = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Artifact:
    """An opened engine directory."""

    path: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Contract:
        return Contract.from_json(self.manifest["model"])

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the graphs, in the order in which data flows through them."""
        return tuple(self.model.components)

    def graph(self, component: str) -> Path:
        return self.path / f"{component}.onnx"

    @property
    def size(self) -> int:
        """Bytes of all files together, the manifest not counted."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def verify(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Read every file and compare its SHA-256, on as many threads as there are cores.

        advance: told how many bytes are done. Raises ArtifactError naming a file that differs.
        """
        pieces = [
            piece
            for name, entry in self.manifest["files"].items()
            for piece in _pieces(self.path / name, entry)
        ]
        done = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(_check_piece, *piece) for piece in pieces]
            try:
                for future in futures:
                    done += future.result()
                    advance(done)
            finally:
                for future in futures:
                    future.cancel()


def open_artifact(path: str | Path, verify: bool = True) -> Artifact:
    """Open an engine directory.

    verify: read every file and compare its SHA-256; False compares the sizes alone.
    Raises ArtifactError naming the file for anything missing, truncated, altered, of a newer format
    or in need of a CPU feature that this machine lacks.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: no such engine directory; "
            f"make one with `glmcompile compile CHECKPOINT -o {path}`."
        )
    if not manifest_path.is_file():
        hint = (
            f"it is a checkpoint; compile it first: `glmcompile compile {path} -o ENGINE`."
            if is_checkpoint(path)
            else "expected a directory written by `glmcompile compile`."
        )
        raise ArtifactError(f"{path}: not an engine, {MANIFEST} is missing; {hint}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        if version == FORMAT_VERSION:  # another version may have other fields
            _check_fields(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{manifest_path}: damaged ({error!r}); compile the checkpoint again."
        ) from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: engine format {version}, but this glmcompile reads {FORMAT_VERSION}; "
            + (
                "upgrade glmcompile."
                if version > FORMAT_VERSION
                else "compile the checkpoint again."
            )
        )
    if manifest.get(OWN_HASH) != own_hash(manifest):
        raise ArtifactError(
            f"{manifest_path}: its SHA-256 differs from the one at its end; "
            "the manifest was altered, copy the engine again or recompile."
        )
    _check_cpu(path, manifest["required_cpu_features"])
    for name, entry in manifest["files"].items():
        _check_size(path / name, entry["bytes"])
    artifact = Artifact(path, manifest)
    if verify:
        artifact.verify()
    return artifact


def check_free(output: Path, overwrite: bool = False) -> None:
    """Raises ArtifactError where something stands at `output` that may not be replaced.

    overwrite: an engine may; anything else there is never touched.
    """
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
        replaceable = (output / MANIFEST).is_file()
    except OSError as error:
        raise ArtifactError(
            f"{output}: cannot write there ({error.strerror}); choose another output."
        ) from error
    if not (overwrite and replaceable):
        raise ArtifactError(
            f"{output}: already exists; choose another output"
            + (" or pass --overwrite." if replaceable else ".")
        )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a directory or file is what an engine is compiled from, and not an engine."""
    path = Path(path)
    described = path.suffix == ".gguf" or (path / "config.json").is_file()
    return (described or any(path.glob("*.gguf"))) and not (path / MANIFEST).exists()


def store_path(output: Path) -> Path:
    """Where a compile to `output` keeps what is done (see compiler.store)."""
    return output.parent / f".{output.name}.compile"


def write_manifest(stage: Path, model: Contract, record: dict[str, Any]) -> None:
    """Describe every file in `stage` in a manifest; `record` holds what else is to be kept."""
    files = {
        file.relative_to(stage).as_posix(): _entry(file)
        for file in sorted(stage.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": model.to_json(),
        **record,
        "files": files,
    }
    manifest[OWN_HASH] = own_hash(manifest)
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def own_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own hash, written without spaces."""
    rest = {name: value for name, value in manifest.items() if name != OWN_HASH}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()


def _entry(file: Path) -> dict[str, Any]:
    """A file's size and SHA-256; of a large one also those of its pieces, in order."""
    whole, pieces = hashlib.sha256(), []
    with open(file, "rb") as stream:
        while piece := stream.read(PIECE):
            whole.update(piece)
            pieces.append(hashlib.sha256(piece).hexdigest())
    entry = {"bytes": file.stat().st_size, "sha256": whole.hexdigest()}
    return {**entry, "pieces": pieces} if len(pieces) > 1 else entry


def _check_fields(manifest: dict[str, Any]) -> None:
    """Reads what opening an engine reads. Raises the error of the first field that is not right."""
    components = Contract.from_json(manifest["model"]).components
    set(manifest["required_cpu_features"])
    files = manifest["files"]
    for name in (*files, *(f"{component}.onnx" for component in components)):
        int(files[name]["bytes"]), str(files[name]["sha256"])
        [str(digest) for digest in files[name].get("pieces", [])]


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file}: missing from the engine; copy it again or recompile.")
    size = file.stat().st_size
    if size != expected:
        raise ArtifactError(
            f"{file}: {size} bytes where the manifest says {expected}; "
            "the engine was truncated or altered, copy it again or recompile."
        )


def _pieces(file: Path, entry: dict[str, Any]) -> list[tuple[Path, int, int, str]]:
    """What of a file is to be hashed: (file, start, bytes, SHA-256)."""
    if "pieces" not in entry:
        return [(file, 0, entry["bytes"], entry["sha256"])]
    return [(file, number * PIECE, PIECE, digest) for number, digest in enumerate(entry["pieces"])]


def _check_piece(file: Path, start: int, length: int, digest: str) -> int:
    """Returns the bytes that were read. Raises ArtifactError where their SHA-256 differs."""
    state, done = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        stream.seek(start)
        while block := stream.read(min(_BLOCK, length - done)):
            state.update(block)
            done += len(block)
    if state.hexdigest() != digest:
        raise ArtifactError(
            f"{file}: its SHA-256 differs from the manifest's; "
            "the engine was altered, copy it again or recompile."
        )
    return done


def _check_cpu(path: Path, required: list[str]) -> None:
    missing = sorted(set(required) - cpu_features()) if required else []
    if missing:
        raise ArtifactError(
            f"{path}: needs the CPU feature(s) {', '.join(missing)}, which this "
            f"{platform.machine()} machine lacks; compile the checkpoint for this machine."
        )


def cpu_features() -> set[str]:
    """Feature flags as Linux names them (`avx2`, `avx512_vnni`, `amx_int8`...); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
