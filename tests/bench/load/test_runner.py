"""Load tests of a server that answers as scripted: counts, errors by kind, what stops one at once.

Delays are compared with each other and with their sums, never with a clock's limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from glmcompile.bench.load.loops import ClosedLoop, OpenLoop
from glmcompile.bench.load.runner import LoadTest, run
from glmcompile.bench.load.workload import Span, Workload
from glmcompile.errors import InputError
from tests.bench.load.scripted import MODEL, TOKENS_PER_WORD, Script, ScriptedServer
from tests.engines import TinyEngine
from tests.serve.servers import ServerThread

SMALL = Workload(Span(20, 20), Span(4, 4))


def measure(server: ScriptedServer | ServerThread, **options: Any) -> dict[str, Any]:
    return run(LoadTest(server.url, **{"workload": SMALL, "requests": 6, "warmup": 0, **options}))


def test_counts_and_tokens_are_the_servers() -> None:
    with ScriptedServer() as server:
        result = measure(server, warmup=3)
    (level,) = result["levels"]
    assert (level["requests"], level["answered"], level["failed"]) == (6, 6, 0)
    assert level["unfinished"] == level["retries"] == 0
    assert level["output_tokens"] == 6 * 4
    assert level["prompt_tokens"] == 6 * (7 + 20)  # 7 of the template
    assert level["cached_tokens"] == 6 * 3
    assert level["requests_per_s"] == pytest.approx(6 / level["seconds"])
    assert len(server.bodies) == 9  # the warm-up's among them
    assert len({str(body["messages"]) for body in server.bodies}) == 9


def test_latencies_add_up_to_the_delays() -> None:
    def script(number: int, body: dict[str, Any]) -> Script:
        return Script(delay=0.3 if number < 3 else 0.05, gap=0.02)

    with ScriptedServer(script) as server:
        (level,) = measure(server)["levels"]
    ttft, tpot, e2e = (level[f"{name}_ms"]["mean"] for name in ("ttft", "tpot", "e2e"))
    assert level["ttft_ms"]["p90"] >= 300
    assert ttft >= (300 + 50) / 2
    assert e2e >= ttft
    assert e2e >= (300 + 50) / 2 + 3 * 20
    assert e2e - ttft == pytest.approx(3 * tpot)
    # One client: no two requests overlap.
    assert level["seconds"] * 1e3 >= 6 * e2e


def test_levels_are_measured_in_turn() -> None:
    loops = (ClosedLoop(1), ClosedLoop(3), OpenLoop(200))
    with ScriptedServer(lambda number, body: Script(delay=0.02)) as server:
        result = measure(server, loops=loops)
    loads = [level["load"] for level in result["levels"]]
    assert loads == [{"concurrency": 1}, {"concurrency": 3}, {"rate": 200}]
    assert [level["answered"] for level in result["levels"]] == [6, 6, 6]
    assert len({str(body["messages"]) for body in server.bodies}) == 18
    assert not result["interrupted"]


@pytest.mark.parametrize("clients", [1, 4])
def test_a_closed_loop_has_as_many_requests_under_way_as_clients(clients: int) -> None:
    with ScriptedServer(lambda number, body: Script(together=clients)) as server:
        measure(server, loops=(ClosedLoop(clients),), requests=8)
    assert server.most_at_once == clients


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (Script(status=500), "HTTP 500", "as scripted"),
        (Script(status=429), "HTTP 429", "as scripted"),
        (Script(ending="cut"), "connection", ""),
        (Script(ending="short"), "malformed", "ended"),
        (Script(ending="garbage"), "malformed", "not JSON"),
        (Script(ending="uncounted"), "malformed", "usage"),
        (Script(ending="error"), "error in stream", "out of luck"),
        (Script(delay=30), "time-out", "--timeout"),
    ],
)
def test_errors_are_counted_by_kind(script: Script, kind: str, words: str) -> None:
    def every_third(number: int, body: dict[str, Any]) -> Script:
        return script if number % 3 == 1 else Script()

    # A time-out is the only kind that has to be waited for.
    timeout = 5.0 if script.delay else 60.0
    with ScriptedServer(every_third) as server:
        (level,) = measure(server, timeout=timeout, loops=(ClosedLoop(6),))["levels"]
    assert (level["answered"], level["failed"]) == (4, 2)
    assert level["errors"][kind]["count"] == 2
    assert words in level["errors"][kind]["first"]
    assert level["output_tokens"] == 4 * 4


def fails_first(status: int, times: int) -> Callable[[int, dict[str, Any]], Script]:
    """Every request fails `times` times before it is answered."""
    seen: dict[str, int] = {}

    def script(number: int, body: dict[str, Any]) -> Script:
        text = str(body["messages"])
        seen[text] = seen.get(text, 0) + 1
        after = {"Retry-After": "0"}
        return Script(status=status, headers=after) if seen[text] <= times else Script()

    return script


def test_retries_are_counted_apart() -> None:
    with ScriptedServer(fails_first(503, 2)) as server:
        (level,) = measure(server, retries=3)["levels"]
    assert (level["answered"], level["failed"]) == (6, 0)
    assert (level["retries"], level["retried_requests"]) == (12, 6)
    assert len(server.bodies) == 18


def test_nothing_is_sent_again_unless_asked_for() -> None:
    with ScriptedServer(fails_first(503, 1)) as server:
        (level,) = measure(server)["levels"]
    assert (level["failed"], level["retries"], len(server.bodies)) == (6, 0, 6)


def test_a_wrong_request_is_not_sent_again() -> None:
    with ScriptedServer(fails_first(400, 1)) as server:
        (level,) = measure(server, retries=3)["levels"]
    assert (level["failed"], level["retries"]) == (6, 0)


def test_a_level_in_which_everything_failed_is_reported() -> None:
    with ScriptedServer(lambda number, body: Script(status=500)) as server:
        (level,) = measure(server, slo={"ttft": 1000.0})["levels"]
    assert (level["answered"], level["ttft_ms"], level["goodput_per_s"]) == (0, None, 0)


def test_texts_are_of_the_tokens_that_the_server_counts() -> None:
    with ScriptedServer() as server:
        measure(server, workload=Workload(Span(50, 50), Span(1, 1), system_tokens=30))
    system, user = server.bodies[0]["messages"]
    assert len(user["content"].split()) * TOKENS_PER_WORD == 50
    assert len(system["content"].split()) * TOKENS_PER_WORD == 30


def test_the_result_says_what_was_measured_where() -> None:
    with ScriptedServer() as server:
        result = measure(server, seed=5, slo={"ttft": 9.0})
    assert result["server"] == {
        "url": server.url,
        "model": MODEL,
        "owned_by": "tests",
        "version": "1.2.3",
    }
    assert result["workload"]["seed"] == 5
    assert result["workload"]["input_tokens"] == {"low": 20, "high": 20}
    assert result["slo_ms"] == {"ttft": 9.0}
    assert set(result["machine"]["versions"]) == {"glmcompile", "numpy", "aiohttp"}


def test_a_seed_repeats_the_requests_and_none_makes_new_ones() -> None:
    def sent(seed: int | None) -> list[dict[str, Any]]:
        with ScriptedServer() as server:
            measure(server, seed=seed, requests=2)
        return server.bodies

    assert sent(1) == sent(1)
    assert sent(None) != sent(None)


def test_a_server_that_limits_answers_by_the_newer_name() -> None:
    with ScriptedServer(refused="max_tokens") as server:
        (level,) = measure(server)["levels"]
    assert level["answered"] == 6
    assert all(body["max_completion_tokens"] == 4 for body in server.bodies)


def test_no_server_is_refused() -> None:
    with ScriptedServer() as server:
        pass
    with pytest.raises(InputError, match="no server answers"):
        measure(server)


def test_a_wrong_key_is_refused() -> None:
    with ScriptedServer(api_key="right") as server:
        with pytest.raises(InputError, match=r"refused the API key.*wrong key.*--api-key"):
            measure(server, api_key="left")
        assert measure(server, api_key="right")["levels"][0]["answered"] == 6


def test_a_model_that_is_not_there_is_refused() -> None:
    with (
        ScriptedServer(models=("one", "two")) as server,
        pytest.raises(InputError, match=r"three.*it has one, two"),
    ):
        measure(server, model="three")


def test_what_the_server_refuses_is_said_before_the_load() -> None:
    with (
        ScriptedServer(refused="ignore_eos") as server,
        pytest.raises(InputError, match="ignore_eos is not supported"),
    ):
        measure(server, workload=Workload(ignore_eos=True))
    assert server.bodies == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected http"):
        run(LoadTest(url))


def test_a_served_engine(tiny_engine: Callable[[str], TinyEngine]) -> None:
    workload = Workload(Span(8, 16), Span(3, 6), 12, ((56, 56), (84, 56)), ignore_eos=True)
    with ServerThread(tiny_engine("glm4v").path) as server:
        result = run(
            LoadTest(
                f"{server.url}/v1",
                (ClosedLoop(2), OpenLoop(50.0)),
                workload,
                requests=6,
                warmup=1,
                slo={"e2e": 600_000.0},
            )
        )
    assert result["server"]["model"] == "model"
    for level in result["levels"]:
        assert level["answered"] == 6, level["errors"]
        assert 6 * 3 <= level["output_tokens"] <= 6 * 6
        assert level["goodput_fraction"] == 1
        assert level["ttft_ms"]["p50"] <= level["e2e_ms"]["p50"]
    completions = [each for each in server.records if each["path"] == "/v1/chat/completions"]
    assert [each["status"] for each in completions] == [200] * (2 + 2 * (1 + 6))  # two probes
