"""The comparison with peers: workers answer or say why not, and results add up to a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import catalogue
import environments
import pytest
import report
import run
import workloads
from workers.protocol import Worker, WorkerError

from tests.engines import TinyEngine

SCRIPTS = Path(run.__file__).with_name("workers")
PREFILL, WAIT = (
    workloads.Figure("prefill.8", "prefill", "tok/s"),
    workloads.Figure("action.first", "action", "s", higher_is_better=False),
)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    script = SCRIPTS / "glmcompile_worker.py"
    started = Worker(Path(sys.executable), script, tmp_path / "log")
    yield started
    started.close()


def load(worker: Worker, engine: TinyEngine) -> None:
    paths = {"checkpoint": str(engine.checkpoint), "model": str(engine.path)}
    worker.call("load", **paths, threads=1, precision="fp32")


def test_a_worker_gives_every_token_with_its_time(
    worker: Worker, tiny_engine: Callable[..., TinyEngine]
) -> None:
    load(worker, tiny_engine("llama"))
    requests = [{"token_ids": [7, 8, 9]}, {"token_ids": [10, 11, 12]}]
    answers = worker.call("generate", requests=requests, tokens=5)
    for answer in answers:
        assert len(answer["tokens"]) == len(answer["seconds"]) == 5
        assert 0 < answer["seconds"][0] <= answer["seconds"][-1]
    alone = worker.call("generate", requests=requests[1:], tokens=5)
    assert alone[0]["tokens"] == answers[1]["tokens"]


def test_a_paused_worker_goes_on_where_it_was(
    worker: Worker, tiny_engine: Callable[..., TinyEngine]
) -> None:
    load(worker, tiny_engine("llama"))
    request = {"requests": [{"token_ids": [7, 8, 9]}], "tokens": 3}
    before = worker.call("generate", **request)
    worker.pause()
    worker.resume()
    assert worker.call("generate", **request)[0]["tokens"] == before[0]["tokens"]


def test_a_worker_says_what_went_wrong_and_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="no such engine directory"):
        worker.call("load", checkpoint="", model="/nowhere", threads=1, precision="fp32")
    assert "glmcompile" in worker.call("installed")


def test_the_last_words_of_a_dead_worker_are_kept(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; input(); sys.exit('out of memory')")
    worker = Worker(Path(sys.executable), script, tmp_path / "log")
    with pytest.raises(WorkerError, match=r"ended during load \(exit status 1\) \| out of memory"):
        worker.call("load")
    worker.close()


def test_text_prompts_have_their_lengths_and_beginnings_of_their_own(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    plan = workloads.text(tiny_checkpoint("llama"))
    (many,) = [each for each in plan.measurements if each.name == "requests.16"]
    prompts = [request["token_ids"] for i in range(4) for request in many.arguments(i)["requests"]]
    assert {len(prompt) for prompt in prompts} == {workloads.REQUEST_TOKENS}
    assert len({tuple(prompt[:32]) for prompt in prompts}) == 64


def test_rates_are_of_the_times_between_tokens() -> None:
    answers = [{"tokens": [1, 2, 3], "seconds": [1.0, 1.5, 2.0]}]
    assert workloads.decode_rate(answers) == 2.0
    assert workloads.throughput([*answers, {"tokens": [4], "seconds": [4.0]}]) == 1.0


def test_short_answers_are_refused() -> None:
    with pytest.raises(WorkerError, match="gave 2 tokens at 2 times; 3 were asked for"):
        run._check_lengths([{"tokens": [1, 2], "seconds": [0.1, 0.2]}], 3)


def test_agreement_counts_tokens_before_the_first_other_one() -> None:
    assert run.agreement([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == {
        "tokens": 3,
        "same": 2.0,
        "answers": 2,
    }


def test_only_peers_that_take_part_are_chosen() -> None:
    assert {peer.name for peer in run.choose(catalogue.AGENT, None)} < {
        peer.name for peer in catalogue.PEERS
    }
    with pytest.raises(run.click.BadParameter, match="'gpt' is not a peer in text"):
        run.choose(catalogue.TEXT, "gpt")


def test_every_program_has_its_script_and_its_environment() -> None:
    for peer in catalogue.PEERS:
        for program in filter(None, (peer.program, peer.converter)):
            assert (SCRIPTS / f"{program.worker}_worker.py").is_file()
            assert program.environment is None or program.environment in environments.ENVIRONMENTS


@pytest.fixture
def result() -> dict[str, Any]:
    def peer(**figures: float) -> dict[str, Any]:
        summaries = {
            key.replace("_", "."): {"median": value, "min": value, "max": value, "repeats": 1}
            for key, value in figures.items()
        }
        return {"figures": summaries, "failures": {}}

    broken = {"figures": {}, "failures": {"install": "no\nwheel"}}
    machine = {
        "cpu": "a CPU",
        "threads": 2,
        "cores": 2,
        "isa": "avx2",
        "memory_gb": 8,
        "os": "Linux",
        "python": "3.11",
        "versions": {},
        "git_commit": None,
        "date": "today",
    }
    return {
        "peers": {
            "glmcompile-int8": peer(prefill_8=300.0, action_first=2.0),
            "slow": peer(prefill_8=100.0, action_first=3.0),
            "fast": peer(prefill_8=150.0),
            "absent": broken,
        },
        "machine": machine,
    }


def test_the_lead_is_over_the_best_peer_whichever_direction_is_better(
    result: dict[str, Any],
) -> None:
    assert report.best_peer(result, PREFILL) == "fast"
    assert report.lead(result, PREFILL) == 2.0
    assert report.lead(result, WAIT) == 1.5


def test_the_table_has_every_peer_and_every_failure(result: dict[str, Any]) -> None:
    text = report.markdown(result, [PREFILL, WAIT])
    assert "| prefill (tok/s) | **300** | 100 | 150 |  | 2.00x than fast |" in text
    assert "| action (s) | **2** | 3 |  |  | 1.50x than slow |" in text
    assert "- absent, install: no wheel" in text


def test_the_plot_is_a_png(result: dict[str, Any], tmp_path: Path) -> None:
    report.plot(result, [PREFILL, WAIT], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    venvs, work = tmp_path / "venvs", tmp_path / "work"
    entrant = run.Entrant(catalogue.PEERS[0], work / "agent", work, venvs, 1)
    entrant.fail("convert", WorkerError(f"{venvs}/peer/bin/python: no {work}/agent"))
    assert entrant.failures == {"convert": "peer/bin/python: no agent"}
