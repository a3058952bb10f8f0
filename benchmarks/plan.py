"""How good `glmcompile plan` is: what it predicts of INT8, beside what is then measured.

    python benchmarks/plan.py reference smollm2 agent --work FOLDER
    python benchmarks/plan.py full_size=CHECKPOINT --work FOLDER

Each model is planned, compiled and asked, on this machine. `reference` is the bundled checkpoint,
`smollm2` and `agent` are written into --work where they are missing; `full_size=CHECKPOINT` takes
what `full_size.py compile` and `step` have measured of it. The constants of the plan were chosen by
the others; `agent` was not used for that. Writes benchmarks/results/plan.json and plan.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from watched import Watched, bytes_below  # noqa: E402

RESULTS = HERE / "results"
SCREEN = (1080, 2400)
ANSWER_TOKENS, REPEATS = 32, 5
TITLES = {
    "engine_gb": "engine on disk (GB)",
    "compile_disk_gb": "disk while compiling, besides (GB)",
    "compile_memory_gb": "memory to compile (GB)",
    "compile_minutes": "time to compile (min)",
    "serve_memory_gb": "memory to serve (GB)",
    "vision_s": "vision encoding (s)",
    "ttft_s": "first token (s)",
    "tpot_ms": "further tokens (ms)",
}


@click.command(help=__doc__)
@click.argument("names", metavar="MODEL...", nargs=-1, required=True)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--ask", is_flag=True, hidden=True, help="Ask the engine MODEL, in this process.")
def main(names: tuple[str, ...], work: Path, ask: bool) -> None:
    if ask:
        click.echo(json.dumps(asked(Path(names[0]))))
        return
    work.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "plan.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        model, _, given = name.partition("=")
        click.echo(f"planning and measuring {model}", err=True)
        result[model] = compared(model, Path(given) if given else checkpoint(model, work), work)
        file.write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "plan.md").write_text(table(result))
    click.echo(table(result))


def checkpoint(model: str, work: Path) -> Path:
    if model == "reference":
        return HERE.parent / "calibration" / "reference"
    folder = work / f"{model}-checkpoint"
    if not folder.exists():
        subprocess.run([sys.executable, HERE / f"{model}.py", folder], check=True)
    return folder


def compared(model: str, source: Path, work: Path) -> dict[str, Any]:
    """Predicted and measured figures of one model, and the machine."""
    from glmcompile.bench import machine
    from glmcompile.targets.cpu import default_threads

    options = ["--recipe", str(HERE / "full_size.toml")] if model == "full_size" else []
    file = work / f"{model}.plan.json"
    subprocess.run(
        [sys.executable, "-m", "glmcompile", "plan", source, "--json", file, *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    planned = json.loads(file.read_text())
    actual = full_size() if model == "full_size" else measured(model, source, work)
    needs = planned["precisions"]["int8"]
    space, time = needs["space"], needs["time"]
    kv = space["kv"] * (actual["tokens"] - 16_000) / 1000
    predicted = {
        "engine_gb": space["engine"] / 1e9,
        "compile_disk_gb": space["compile_disk"] / 1e9,
        "compile_memory_gb": space["compile_memory"] / 1e9,
        "compile_minutes": time["compile"] / 60,
        "serve_memory_gb": (space["serve_memory"] + kv) / 1e9,
        "vision_s": time["vision"],
        "ttft_s": time["ttft"],
        "tpot_ms": 1e3 * time["tpot"],
    }
    return {
        "parameters": planned["parameters"],
        "predicted": {key: round(value, 4) for key, value in predicted.items()},
        "measured": {key: round(actual[key], 4) for key in predicted},
        "prompt_tokens": {"predicted": planned["prompt"]["tokens"], "measured": actual["tokens"]},
        "measured_on": machine.describe(default_threads()),
    }


def measured(model: str, source: Path, work: Path) -> dict[str, float]:
    """Compiles the model and asks the engine."""
    engine = work / f"{model}.planned"
    # An engine that is replaced would count as disk that compiling needs.
    shutil.rmtree(engine, ignore_errors=True)
    watched = Watched(source, engine, work / "plan.log")
    if watched.wait():
        raise click.ClickException(f"compiling {model} failed: see {work / 'plan.log'}")
    size = bytes_below(engine)
    answer = subprocess.run(
        [sys.executable, __file__, str(engine), "--work", str(work), "--ask"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {
        "engine_gb": size / 1e9,
        "compile_disk_gb": (watched.disk - size) / 1e9,
        "compile_memory_gb": watched.peak / 1e9,
        "compile_minutes": watched.seconds / 60,
        **json.loads(answer.stdout.splitlines()[-1]),
    }


def asked(engine: Path) -> dict[str, float]:
    """Memory, and medians of the latency, of requests like the one that is planned for."""
    from PIL import Image

    import glmcompile
    from glmcompile.bench.footprint import peak_memory_mb

    options = {"prefix_caching": False, "encoder_cache_bytes": 0, "verify": False}
    with glmcompile.load(engine, **options) as loaded:
        words = (HERE / "serving" / "system_prompt.txt").read_text()
        tokenizer = loaded.prompts.tokenizer
        ids = tokenizer.encode(words, add_special_tokens=False).ids[:585]
        text = tokenizer.decode(ids)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if loaded.model.vision is not None:
            noise = Image.effect_noise((SCREEN[0] // 4, SCREEN[1] // 4), 80).resize(SCREEN)
            content.insert(0, {"type": "image", "image": noise.convert("RGB")})
        messages = [{"role": "user", "content": content if len(content) > 1 else text}]
        sampling = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        # The first one warms up.
        completions = [loaded.generate(messages=messages, **sampling) for _ in range(1 + REPEATS)]
    usage, timings = completions[0].usage, [each.timings for each in completions[1:]]
    return {
        "serve_memory_gb": peak_memory_mb() / 1e3,
        "vision_s": statistics.median(each.vision for each in timings),
        "ttft_s": statistics.median(each.ttft for each in timings),
        "tpot_ms": 1e3 * statistics.median(each.per_token for each in timings),
        "tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def full_size() -> dict[str, float]:
    """What full_size.py measured."""
    result = json.loads((RESULTS / "full_size.json").read_text())
    compiled, step = result["compile"], result["step"]
    return {
        "engine_gb": compiled["engine_gb"],
        "compile_disk_gb": compiled["compile_extra_disk_gb"],
        "compile_memory_gb": compiled["compile_peak_memory_gb"],
        "compile_minutes": compiled["compile_minutes"],
        "serve_memory_gb": step["serve_memory_gb"],
        "vision_s": step["vision_seconds"],
        "ttft_s": step["ttft_seconds"],
        "tpot_ms": 1e3 / step["tokens_per_s"],
        "tokens": step["prompt_tokens"] + step["answer_tokens"],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: predicted, measured and their ratio."""
    lines = ["| INT8 | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    for key, title in TITLES.items():
        cells = []
        for each in result.values():
            guess, fact = each["predicted"][key], each["measured"][key]
            cells.append(f"{guess:.3g} / {fact:.3g} = {guess / fact:.2f}" if fact else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "Predicted / measured.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
