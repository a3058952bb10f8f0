"""This server and llama.cpp's under the same load: the same checkpoint, clients and threads.

Q8_0 is llama.cpp's 8-bit format: weights of 8 bits, activations quantized as they are used.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from server import Server, served

import glmcompile
from glmcompile.bench.load.loops import ClosedLoop
from glmcompile.bench.load.runner import LoadTest, run
from glmcompile.bench.load.workload import Span, Workload
from glmcompile.targets.cpu import default_threads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import environments

CLIENTS = (1, 4, 16)
WORKLOAD = Workload(input_tokens=Span(256, 256), output_tokens=Span(64, 64), ignore_eos=True)
SLOT_TOKENS = 1024  # of llama.cpp's context for each client
COMPARED_TOKENS = 16
UNUSED = (  # of what llama.cpp builds
    "LLAMA_USE_PREBUILT_UI",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
)
QUESTIONS = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "Name three colours.",
    "Explain what a compiler does.",
    "How many days has a week?",
    "Write a short greeting to a friend.",
    "What do plants need to grow?",
    "Why is the sky blue?",
)


def measure(
    engine: Path, float_engine: Path, checkpoint: Path, work: Path, repetitions: int
) -> dict[str, Any]:
    """Each level of load on one server and then on the other, the first round to warm up.

    float_engine: whose answers are the ones to agree with.
    """
    binary, model = build_server(work / "venvs"), work / "smollm2-q8_0.gguf"
    if not model.exists():
        convert(work / "venvs", checkpoint, model)
    expected = [answer.text for answer in _answers(float_engine)]
    rounds: dict[str, list[dict[str, Any]]] = {}
    agreement = {}
    with served(engine) as ours, llama_server(binary, model) as theirs:
        servers = {"glmcompile-int8": ours, "llama.cpp-q8_0": theirs}
        for name, server in servers.items():
            with _awake(server, servers):
                agreement[name] = statistics.mean(map(_common, expected, _ask(server)))
        for repetition in range(-1, repetitions):
            for name, server in servers.items():
                with _awake(server, servers):
                    levels = load(server.url, seed=repetition + 1)
                if repetition >= 0:
                    rounds.setdefault(name, []).append(levels)
    figures = {name: _medians(measured) for name, measured in rounds.items()}
    own, peer = figures.values()
    return {
        "checkpoint": "SmolLM2-135M-Instruct",
        "workload": WORKLOAD.describe(),
        "repetitions": repetitions,
        "threads": default_threads(),
        "llama.cpp": environments.LLAMA_CPP,
        "agreement_with_fp32": agreement,
        "figures": figures,
        "output_tokens_per_s_ratio": {
            level: own[level]["output_tokens_per_s"] / peer[level]["output_tokens_per_s"]
            for level in own
        },
        "ttft_ratio": {level: peer[level]["ttft_ms"] / own[level]["ttft_ms"] for level in own},
    }


def load(url: str, seed: int) -> dict[str, dict[str, Any]]:
    """One load test, its levels by the number of clients. Raises RuntimeError if requests fail."""
    result = run(
        LoadTest(url, [ClosedLoop(n) for n in CLIENTS], WORKLOAD, requests=32, seed=seed, warmup=4)
    )
    for level in result["levels"]:
        if level["failed"]:
            raise RuntimeError(f"{url}: {level['failed']} requests failed: {level['errors']}")
        wanted = level["answered"] * WORKLOAD.output_tokens.high
        if level["output_tokens"] != wanted:
            raise RuntimeError(f"{url}: {level['output_tokens']} tokens where {wanted} were asked")
    return dict(zip(map(str, CLIENTS), result["levels"], strict=True))


def _medians(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By level: the medians over repetitions, and the tokens of a prompt as the server counts."""

    def of(level: str, *path: str) -> float:
        values = []
        for each in rounds:
            value = each[level]
            for key in path:
                value = value[key]
            values.append(value)
        return round(statistics.median(values), 3)

    return {
        level: {
            "output_tokens_per_s": of(level, "output_tokens_per_s"),
            "ttft_ms": of(level, "ttft_ms", "p50"),
            "tpot_ms": of(level, "tpot_ms", "p50"),
            "itl_p99_ms": of(level, "itl_ms", "p99"),
            "prompt_tokens": of(level, "prompt_tokens") / of(level, "answered"),
            "cached_tokens": of(level, "cached_tokens"),
        }
        for level in rounds[0]
    }


def _chat(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": COMPARED_TOKENS, "temperature": 0}


def _answers(engine: Path) -> list[Any]:
    with glmcompile.load(engine) as loaded:
        return [loaded.generate(**_chat(question)) for question in QUESTIONS]


def _ask(server: Server) -> list[str]:
    texts = []
    model = json.loads(server.get("/v1/models"))["data"][0]["id"]
    for question in QUESTIONS:
        body = {**_chat(question), "model": model}
        status, answer = server.post("/v1/chat/completions", json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{server.url}: status {status}: {answer}")
        texts.append(answer["choices"][0]["message"]["content"])
    return texts


def _common(expected: str, text: str) -> float:
    """The share of an answer's characters before the first that differs."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(expected, text, strict=False))
    return sum(1 for _ in same) / len(expected)


@contextlib.contextmanager
def _awake(server: Server, servers: dict[str, Server]) -> Iterator[None]:
    """Stops the others meanwhile."""
    others = [each.process for each in servers.values() if each is not server]
    for process in others:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in others:
            process.send_signal(signal.SIGCONT)


def build_server(venvs: Path) -> Path:
    """llama.cpp's `llama-server`, built for this machine. Raises CalledProcessError."""
    folder = environments.ensure("llama-server", venvs)
    built = folder / "build"
    binary = built / "bin" / "llama-server"
    if not binary.exists():
        cmake = [str(folder / "bin" / "cmake")]
        source = folder / "source" / "vendor" / "llama.cpp"
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DGGML_NATIVE=ON",
            *(f"-D{o}=OFF" for o in UNUSED),
        ]
        subprocess.run([*cmake, "-S", str(source), "-B", str(built), *options], check=True)
        subprocess.run(
            [*cmake, "--build", str(built), "--target", "llama-server", "-j", "2"], check=True
        )
    return binary


def convert(venvs: Path, checkpoint: Path, model: Path) -> None:
    """Writes the checkpoint as a GGUF file by llama.cpp's own script."""
    folder = environments.ensure("llama-server", venvs)
    script = folder / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [str(environments.python(folder)), str(script), str(checkpoint)]
    subprocess.run([*command, "--outtype", "q8_0", "--outfile", str(model)], check=True)


@contextlib.contextmanager
def llama_server(binary: Path, model: Path) -> Iterator[Server]:
    """A running llama-server with a slot for each client, on a free port.

    Raises RuntimeError if it never gets ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slots, threads = max(CLIENTS), str(default_threads())
    command = [str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * SLOT_TOKENS)]
    command += ["--threads", threads, "--threads-batch", threads, "--jinja"]
    log = model.with_suffix(".log")
    with log.open("wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
        server = Server(process, f"http://127.0.0.1:{port}", 0.0)
        try:
            while not _healthy(server.url):
                if process.poll() is not None or time.perf_counter() - began > 120:
                    raise RuntimeError(f"llama-server did not get ready; see {log}")
                time.sleep(0.05)
            yield server
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
