"""A compile's working directory: kept when interrupted, resumed under its key, gone otherwise."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from glmcompile.artifact import MANIFEST, open_artifact, store_path, write_manifest
from glmcompile.compiler.store import open_store
from glmcompile.errors import ArtifactError
from tests.contracts import text_contract

MODEL = text_contract()
KEY = {"source": "a"}


def write_engine(folder: Path, precision: str = "int8") -> None:
    (folder / "decoder.onnx").write_bytes(b"graph")
    write_manifest(folder, MODEL, {"precision": precision, "required_cpu_features": []})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "engine"


def interrupt(output: Path, key: dict[str, str] = KEY) -> None:
    """A compile that writes half an engine, records one stage and is interrupted."""

    def compile_half() -> None:
        with open_store(output, key) as store:
            (store.engine / "weights.bin").write_bytes(b"half")
            store.record("torch", {"layers": 2})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_half()


def test_what_is_complete_becomes_the_output(output: Path) -> None:
    with open_store(output, KEY) as store:
        write_engine(store.engine)
        assert not output.exists()
    assert open_artifact(output).manifest["precision"] == "int8"
    assert [each.name for each in output.parent.iterdir()] == ["engine"]


def test_an_interrupted_one_is_kept_and_goes_on(output: Path) -> None:
    interrupt(output)
    assert [each.name for each in output.parent.iterdir()] == [".engine.compile"]
    with open_store(output, KEY) as store:
        assert store.result("torch") == {"layers": 2}
        assert store.result("decoder/end") is None
        assert (store.engine / "weights.bin").read_bytes() == b"half"
        write_engine(store.engine)
    assert [each.name for each in output.parent.iterdir()] == ["engine"]


def test_another_key_begins_anew(output: Path) -> None:
    interrupt(output)
    with open_store(output, {"source": "b"}) as store:
        assert store.result("torch") is None
        assert list(store.engine.iterdir()) == []
        write_engine(store.engine)


def test_a_line_that_a_kill_cut_does_not_count(output: Path) -> None:
    interrupt(output)
    journal = store_path(output) / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"stage": "decoder/end", "resu')
    with open_store(output, KEY) as store:
        assert store.result("torch") == {"layers": 2}
        assert store.result("decoder/end") is None
        store.record("decoder/end", {})
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [line.get("stage") for line in lines] == [None, "torch", "decoder/end"]
        write_engine(store.engine)


def test_a_journal_that_is_no_text_begins_anew(output: Path) -> None:
    interrupt(output)
    (store_path(output) / "journal.jsonl").write_bytes(b"\xff\xfe\x00")
    with open_store(output, KEY) as store:
        assert store.results() == {}
        write_engine(store.engine)


def test_an_error_leaves_nothing(output: Path) -> None:
    def fail() -> None:
        with open_store(output, KEY) as store:
            write_engine(store.engine)
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert list(output.parent.iterdir()) == []


def test_a_full_disk_says_so_and_keeps_what_is_done(output: Path) -> None:
    def fill_disk() -> None:
        with open_store(output, KEY) as store:
            store.record("torch", {})
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match=r"the disk is full .* run the same command again"):
        fill_disk()
    with open_store(output, KEY) as store:
        assert store.result("torch") == {}
        write_engine(store.engine)


def test_two_compiles_to_one_output_do_not_meet(output: Path) -> None:
    with open_store(output, KEY) as store:
        with (
            pytest.raises(ArtifactError, match="another process compiles to it"),
            open_store(output, KEY),
        ):
            pytest.fail("the store is locked")
        write_engine(store.engine)
    assert open_artifact(output)


def test_an_engine_is_replaced_only_on_request(output: Path) -> None:
    output.mkdir()
    write_engine(output)
    with (
        pytest.raises(ArtifactError, match=r"already exists.*--overwrite"),
        open_store(output, KEY),
    ):
        pytest.fail("the output is taken")
    before = (output / MANIFEST).read_bytes()
    with pytest.raises(RuntimeError), open_store(output, KEY, overwrite=True):
        raise RuntimeError
    assert (output / MANIFEST).read_bytes() == before
    with open_store(output, KEY, overwrite=True) as store:
        shutil.copytree(output, store.engine, dirs_exist_ok=True)
        write_engine(store.engine, "fp32")
    assert open_artifact(output).manifest["precision"] == "fp32"


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(ArtifactError, match="already exists"),
        open_store(tmp_path, KEY, overwrite=True),
    ):
        pytest.fail("the output is taken")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_output_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="cannot write there"),
        open_store(tmp_path / ("x" * 300), KEY),
    ):
        pytest.fail("no file has such a name")
