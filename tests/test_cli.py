"""The command line: answers on stdout, errors as one clear line with exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import glmcompile
import glmcompile.bench
import glmcompile.compiler
from glmcompile.artifact import own_hash
from glmcompile.cli import main


def invoke(*arguments: object, **options: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("cli") / "engine"
    result = invoke("compile", tiny_checkpoint("glm4v"), "-o", output, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert "MiB" in result.output
    return output


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    file = tmp_path / "screen.png"
    Image.new("RGB", (84, 112), "teal").save(file)
    return file


def test_run_prints_the_engines_answer(engine: Path, screen: Path) -> None:
    options = ("--image", screen, "--prompt", "What?", "--max-tokens", 6)
    whole, streamed = invoke("run", engine, *options), invoke("run", engine, *options, "--stream")
    with glmcompile.load(engine) as loaded:
        expected = loaded.generate(prompt="What?", images=[screen], max_tokens=6).text
    assert whole.exit_code == 0
    assert whole.stdout == streamed.stdout == expected + "\n"


def test_run_reads_the_prompt_from_stdin_and_reports_counts(engine: Path) -> None:
    options = ("--prompt", "-", "--max-tokens", 3, "--stats", "--temperature", 0.8, "--seed", 1)
    result = invoke("run", engine, *options, input="Hello")
    assert result.exit_code == 0
    assert json.loads(result.stderr)["usage"]["completion_tokens"] <= 3


def test_a_prompt_that_is_no_text_is_refused(engine: Path) -> None:
    refused(invoke("run", engine, "--prompt", "-", input=b"\xff\xfe"), "stdin", "UTF-8")


def test_inspect_names_architecture_files_and_parity(engine: Path) -> None:
    text = invoke("inspect", engine).output
    for word in ("Glm4vForConditionalGeneration", "fp32", "weights.bin", "vision_encoder"):
        assert word in text
    assert json.loads(invoke("inspect", engine, "--json").output)["precision"] == "fp32"


@pytest.mark.parametrize("command", ["compile", "run", "serve", "bench", "inspect"])
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(invoke("compile", tmp_path / "gone", "-o", tmp_path / "e"), "gone")
    refused(invoke("compile", tmp_path, "-o", tmp_path / "e"), "config.json")


def test_a_tokenizer_no_engine_could_open_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    refused(invoke("compile", tmp_path / "copy", "-o", tmp_path / "e"), "tokenizer.json")
    assert not (tmp_path / "e").exists()


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["FancyForCausalLM"], "model_type": "fancy"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("compile", tmp_path, "-o", tmp_path / "e")
    refused(result, "FancyForCausalLM", "transformers")


def test_an_image_that_is_not_one_is_refused(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "screen.png").write_text("no picture")
    result = invoke("run", engine, "--image", tmp_path / "screen.png", "--prompt", "x")
    refused(result, "screen.png")


def test_a_prompt_longer_than_the_context_is_refused(engine: Path) -> None:
    refused(invoke("run", engine, "--prompt", "word " * 4000), "context")


def test_a_sampling_option_out_of_range_is_refused(engine: Path) -> None:
    refused(invoke("run", engine, "--prompt", "x", "--top-p", "3"), "top_p")


def test_an_altered_engine_is_refused(engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in engine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / "weights.bin").open("r+b") as weights:
        weights.write(b"altered")
    refused(invoke("inspect", copy), "weights.bin", "SHA-256")


def test_a_manifest_without_what_inspect_shows_is_refused(engine: Path, tmp_path: Path) -> None:
    shutil.copytree(engine, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    del manifest["tools"]
    manifest["sha256"] = own_hash(manifest)
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    refused(invoke("inspect", tmp_path / "copy"), "manifest.json", "damaged")


def test_a_taken_output_is_refused(engine: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    refused(invoke("compile", tiny_checkpoint("llama"), "-o", engine), "already exists")


def test_an_interrupt_inside_generated_code_exits_with_130(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import glmcompile.compiler
from glmcompile.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
glmcompile.compiler.compile_checkpoint = lambda *arguments, **options: eval(
    "os.kill(os.getpid(), signal.SIGINT)"
)
main(["compile", "checkpoint", "-o", sys.argv[1]])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "engine")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 130
    assert process.stderr.endswith("interrupted; nothing was written.\n")


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_bench_refuses_an_unwritable_file_before_it_measures(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(
        glmcompile.bench, "run", lambda *arguments, **options: pytest.fail("measured")
    )
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "figures"
    refused(invoke("bench", engine, "--baseline", engine, option, file), str(file), "cannot be")


def test_a_picture_needs_a_baseline(engine: Path, tmp_path: Path) -> None:
    refused(invoke("bench", engine, "--plot", tmp_path / "plot.png"), "--baseline")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_little_disk_is_refused_before_anything_is_written(
    small_disk: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    command = ("compile", tiny_checkpoint("llama"), "-o", small_disk / "engine")
    refused(invoke(*command), "0.9 MB are free", "MB of disk")
    assert list(small_disk.iterdir()) == []


def test_a_compile_goes_on_when_a_full_disk_has_space_again(
    small_disk: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills while compiling, as it does when others write to it."""
    monkeypatch.setattr(glmcompile.compiler, "check_resources", lambda *arguments: None)
    command = ("compile", tiny_checkpoint("llama"), "-o", small_disk / "engine")
    refused(invoke(*command), "the disk is full", "run the same command again")
    assert [each.name for each in small_disk.iterdir()] == [".engine.compile"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert [each.name for each in small_disk.iterdir()] == ["engine"]
