"""The working directory of a compile: beside the output, kept when interrupted, gone when done.

    .<output>.compile/
        journal.jsonl   the key of what is compiled, and one line for each stage that is done
        engine/         what becomes the output
        work/           values between layers, and what torch computed

A stage is done when its line is in the journal; what a stage writes is complete before that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmcompile.artifact import check_free, store_path
from glmcompile.errors import ArtifactError

JOURNAL = "journal.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Store:
    """An open store. Made by `open_store`."""

    def __init__(self, path: Path, journal: Path, done: dict[str, Any]) -> None:
        self.path = path
        self._journal = journal
        self._done = done

    @property
    def engine(self) -> Path:
        """The directory that becomes the engine."""
        return self.path / "engine"

    @property
    def work(self) -> Path:
        return self.path / "work"

    def result(self, stage: str) -> Any | None:
        """What a stage recorded when it was done; None while it is not."""
        return self._done.get(stage)

    def results(self) -> dict[str, Any]:
        """What every stage recorded that is done, in their order."""
        return dict(self._done)

    def record(self, stage: str, result: Any) -> None:
        """The stage is done, and this is what the rest of the compile needs of it."""
        line = json.dumps({"stage": stage, "result": result}) + "\n"
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._done[stage] = result


@contextlib.contextmanager
def open_store(output: str | Path, key: dict[str, Any], overwrite: bool = False) -> Iterator[Store]:
    """The store of `output`, which its engine/ becomes when the block ends.

    key: everything that the engine's bytes depend on; a store of another key is thrown away.
    overwrite: replace an engine that stands at `output`; anything else there is never touched.
    An interrupt and a full disk keep the store, so that the next compile with this key goes on in
    it; another error removes it. Raises ArtifactError when `output` is taken or cannot be written,
    the disk is full, or another process compiles to `output`.
    """
    output = Path(output)
    path = store_path(output)
    check_free(output, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise ArtifactError(
            f"{output}: cannot write there ({error.strerror}); choose another output."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(
                f"{output}: another process compiles to it ({path} is locked); "
                "wait for it or choose another output."
            ) from error
        try:
            store = _resume(path, key)
            yield store
            if output.is_dir():
                shutil.rmtree(output)
            os.replace(store.engine, output)
            shutil.rmtree(path)
        except KeyboardInterrupt:  # what is done is kept
            raise
        except OSError as error:
            if error.errno not in _FULL:
                shutil.rmtree(path, ignore_errors=True)
                raise
            free = shutil.disk_usage(output.parent).free / 2**20
            raise ArtifactError(
                f"{output}: the disk is full ({free:.0f} MiB free). Free some space and run the "
                f"same command again to go on, or remove {path}."
            ) from error
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


def _resume(path: Path, key: dict[str, Any]) -> Store:
    """The store with what is done of the same key, or emptied."""
    journal = path / JOURNAL
    lines = _lines(journal)
    done = {line["stage"]: line["result"] for line in lines[1:]}
    if not lines or lines[0] != {"key": key}:
        for each in path.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name != "lock":
                each.unlink()
        done = {}
        journal.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
    else:  # a line that was cut by a kill is gone, and nothing is appended to it
        whole = "".join(json.dumps(line) + "\n" for line in lines)
        journal.write_text(whole, encoding="utf-8")
    store = Store(path, journal, done)
    store.engine.mkdir(exist_ok=True)
    store.work.mkdir(exist_ok=True)
    return store


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The journal's whole lines."""
    lines: list[dict[str, Any]] = []
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
