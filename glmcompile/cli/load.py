"""The load test of `glmcompile bench --url`: its options, and what they mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmcompile.cli.groups import GroupedOption
from glmcompile.errors import InputError

if TYPE_CHECKING:
    from glmcompile.bench.load.runner import LoadTest
    from glmcompile.bench.load.workload import Span

GROUP = "Options of a load test (--url)"


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(each) for each in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < each < math.inf for each in rates):
        raise click.BadParameter(f"{text!r}: numbers above 0 were expected, such as 0.5,1,2.")
    return rates


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise click.BadParameter(f"{text!r}: whole numbers were expected, such as 1,4,16.")
    return tuple(int(each) for each in text.split(","))


def _span(text: str) -> Span:
    from glmcompile.bench.load.workload import Span

    match = re.fullmatch(r"([1-9]\d*)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if low > high:
        raise click.BadParameter(f"{text!r}: a number or a range was expected, such as 64-256.")
    return Span(low, high)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise click.BadParameter(
            f"{text!r}: WIDTHxHEIGHT in pixels was expected, such as 336x336,1080x2400."
        )
    pairs = (each.split("x") for each in text.split(","))
    return tuple((int(width), int(height)) for width, height in pairs)


def _slo(text: str) -> dict[str, float]:
    found = dict(re.findall(r"(ttft|tpot|e2e)=(\d+(?:\.\d+)?)(?:,|$)", text))
    if ",".join(f"{name}={value}" for name, value in found.items()) != text:
        raise click.BadParameter(
            f"{text!r}: milliseconds of ttft, tpot or e2e were expected, as in ttft=2000,tpot=100."
        )
    return {name: float(value) for name, value in found.items()}


# Names of the parameters are those of LoadTest and Workload, as far as they go.
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--model", {"help": "Its name at the server; default: the first that the server has."}),
    (
        "--api-key",
        {"envvar": "OPENAI_API_KEY", "help": "Key to send; default: the variable OPENAI_API_KEY."},
    ),
    (
        "--concurrency",
        {
            "type": _counts,
            "metavar": "N,...",
            "help": "Closed loop: so many clients at once, each sending its next request when the "
            "last was answered. Default: 1, unless there is --rate.",
        },
    ),
    (
        "--rate",
        {
            "type": _rates,
            "metavar": "R,...",
            "help": "Open loop: so many requests a second on average (Poisson).",
        },
    ),
    (
        "--requests",
        {
            "type": click.IntRange(1),
            "help": "Of each level of load; default: 32, or with --rate and --duration as many as "
            "arrive.",
        },
    ),
    (
        "--duration",
        {
            "type": click.FloatRange(0, min_open=True),
            "help": "Seconds after which a level sends no more.",
        },
    ),
    (
        "--warmup",
        {
            "type": click.IntRange(0),
            "default": 2,
            "show_default": True,
            "help": "Requests before each level that do not count.",
        },
    ),
    (
        "--input-tokens",
        {
            "type": _span,
            "metavar": "N|N-M",
            "default": "256",
            "show_default": True,
            "help": "Of each request's text, about; a range is drawn from evenly.",
        },
    ),
    (
        "--output-tokens",
        {
            "type": _span,
            "metavar": "N|N-M",
            "default": "64",
            "show_default": True,
            "help": "Limit of each answer.",
        },
    ),
    (
        "--system-tokens",
        {
            "type": click.IntRange(0),
            "default": 0,
            "show_default": True,
            "help": "Of a system prompt that all requests share.",
        },
    ),
    (
        "--image",
        {
            "type": _sizes,
            "metavar": "WxH,...",
            "default": None,
            "help": "A drawn screen of one of these sizes in each request, no two alike.",
        },
    ),
    (
        "--prompts",
        {
            "type": click.Path(path_type=Path),
            "metavar": "FILE",
            "help": "Send these in turn: JSONL, a list of messages a line.",
        },
    ),
    (
        "--ignore-eos",
        {"is_flag": True, "help": "Ask for answers up to their limit, which some servers know."},
    ),
    (
        "--slo",
        {
            "type": _slo,
            "metavar": "NAME=MS,...",
            "help": "Count goodput: answers within these of ttft, tpot and e2e.",
        },
    ),
    (
        "--timeout",
        {
            "type": click.FloatRange(0, min_open=True),
            "default": 600.0,
            "show_default": True,
            "help": "Seconds that a request may take.",
        },
    ),
    (
        "--retries",
        {
            "type": click.IntRange(0),
            "default": 0,
            "show_default": True,
            "help": "Of a request that met a full or failing server; counted apart.",
        },
    ),
    (
        "--seed",
        {"type": click.IntRange(0), "help": "Repeats the same requests; default: new ones."},
    ),
)


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a load test to a command."""
    for name, options in reversed(_OPTIONS):
        command = click.option(name, cls=GroupedOption, group=GROUP, **options)(command)
    return command


def load_test(url: str, given: list[str], options: dict[str, Any]) -> LoadTest:
    """The test that options ask for; `given`: those that stand in the command.

    Raises InputError for --prompts beside what it replaces, and a file that cannot be read.
    """
    from glmcompile.bench.load.loops import ClosedLoop, Loop, OpenLoop
    from glmcompile.bench.load.runner import LoadTest
    from glmcompile.bench.load.workload import Workload, read_conversations

    file = options.pop("prompts")
    replaced = [each for each in ("--input-tokens", "--system-tokens", "--image") if each in given]
    if file is not None and replaced:
        raise InputError(
            f"--prompts {file} and {', '.join(replaced)}: the file says what is sent; give one."
        )
    rates, counts = options.pop("rate") or (), options.pop("concurrency") or ()
    loops: list[Loop] = [ClosedLoop(count) for count in counts or (() if rates else (1,))]
    loops += [OpenLoop(rate) for rate in rates]
    workload = Workload(
        **{name: options.pop(name) for name in ("input_tokens", "output_tokens", "system_tokens")},
        image_sizes=options.pop("image") or (),
        conversations=() if file is None else read_conversations(file),
        ignore_eos=options.pop("ignore_eos"),
    )
    return LoadTest(url, loops, workload, **options)
