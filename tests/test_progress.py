"""Progress on the terminal: stages, and one estimate over all of them."""

from __future__ import annotations

import pytest

from glmcompile.cli.progress import TerminalProgress


def test_the_estimate_over_all_stages_follows_each() -> None:
    with TerminalProgress(time_left=True) as progress:
        progress.expect({"hash": 1.0, "compile": 3.0})
        [everything] = progress._bars.tasks
        progress.stage("hash")
        assert (everything.completed, everything.total) == (0, 4)
        advance = progress.stage("compile", 10)
        assert everything.completed == 1
        advance(5)
        assert everything.completed == pytest.approx(2.5)
    assert everything.finished


def test_what_an_earlier_run_did_counts_for_no_speed() -> None:
    with TerminalProgress(time_left=True) as progress:
        progress.expect({"hash": 1.0, "compile": 4.0})
        [everything] = progress._bars.tasks
        progress.stage("hash")
        advance = progress.stage("compile", 4, done=3)
        assert (everything.completed, everything.total) == (1, 2)
        advance(4)
        assert everything.completed == 2
    assert everything.finished


def test_stages_that_nothing_was_expected_of_move_no_estimate() -> None:
    with TerminalProgress() as progress:
        progress.stage("alone", 2)(1)
        assert [task.description for task in progress._bars.tasks] == ["alone"]
