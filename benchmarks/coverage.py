"""Compiles a tiny checkpoint of every architecture and says what works.

    python benchmarks/coverage.py run [TYPES...]     # those not done yet, a process for each
    python benchmarks/coverage.py table              # coverage.md from coverage.json

For each of the 100 types that transformers lists for images and text, and of 40 text decoders, a
checkpoint with random weights and the published proportions of its config (see architectures/) is
compiled to FP32 and INT8. A row says what was found: whether FP32 equals transformers' eager (every
layer, packed and in chunks over a permuted block table; 16 greedy tokens), the error of INT8's
logits, several images and mixed sizes, a batch against single requests, small chunks against
whole prompts, reused prefixes against fresh ones, and what an engine needs to run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
JSON, MARKDOWN = RESULTS / "coverage.json", RESULTS / "coverage.md"
INT8_LIMIT = 0.3  # relative error of the logits (root mean squares), INT8 against FP32
TOKENS = 16
SIZES = ((140, 112), (90, 200))  # width and height of the images of a prompt
SHORT_RECIPE = "[calibration]\nsamples = 4\n"


@click.group()
def main() -> None:
    """What works of each architecture."""


@main.command()
@click.argument("types", nargs=-1)
@click.option("--seconds", default=300, show_default=True, help="Longest a row may take.")
@click.option("--again", is_flag=True, help="Also rows that are there.")
def run(types: tuple[str, ...], seconds: int, again: bool) -> None:
    """Fill in the rows of TYPES; of all types by default."""
    from benchmarks.architectures import types as every

    result = _read()
    done = set() if again else {row["type"] for row in result["types"]}
    for name in [each for each in types or every() if each not in done]:
        began = time.monotonic()
        row = make_row(name, seconds)
        row["seconds"] = round(time.monotonic() - began, 1)
        kept = [each for each in result["types"] if each["type"] != name]
        result["types"] = sorted([*kept, row], key=lambda each: each["type"])
        result |= _machine()
        JSON.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"{name:26} {'ok' if row['parity'] else row['reason']}"[:160])
    _write_table(result)


def make_row(name: str, seconds: int) -> dict[str, Any]:
    """One row, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, "row", name, str(file)]
        try:
            done = subprocess.run(
                command, timeout=seconds, capture_output=True, text=True, cwd=REPOSITORY
            )
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"not done in {seconds} s"
        if file.is_file():
            return json.loads(file.read_text())
    return {"type": name, "parity": False, "torch_free": False, "override": None, "reason": reason}


@main.command(hidden=True)
@click.argument("name")
@click.argument("output", type=Path)
def row(name: str, output: Path) -> None:
    """One row, in this process."""
    from benchmarks.architectures import differences, write_checkpoint

    found: dict[str, Any] = {
        "type": name,
        "parity": False,
        "torch_free": False,
        "override": None,
        "reason": None,
        "differences": {key: list(values) for key, values in differences(name).items()},
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(name, Path(folder) / "checkpoint")
            _fill(found, checkpoint, Path(folder))
    except Exception as error:  # whatever stands against it is what the table says
        found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found["parity"] = False
    output.write_text(json.dumps(found))


def _fill(found: dict[str, Any], checkpoint: Path, folder: Path) -> None:
    import glmcompile
    from glmcompile.artifact import open_artifact

    (folder / "recipe.toml").write_text(SHORT_RECIPE)
    engines = {}
    for precision in ("fp32", "int8"):
        engines[precision] = folder / f"{precision}.engine"
        options: dict[str, Any] = {"precision": precision}
        if precision == "int8":
            options["recipe"] = folder / "recipe.toml"
        glmcompile.compile(checkpoint, engines[precision], **options)
    manifests = {name: open_artifact(path).manifest for name, path in engines.items()}
    for component in ("vision_encoder", "decoder"):
        errors = [
            each["max_error"]
            for each in manifests["fp32"]["parity"]
            if each["component"] == component
        ]
        found[f"{component}_error"] = max(errors, default=None)
    shipped = manifests["int8"]["shipped"]
    found["int8_error"] = next(e["chain_error"] for e in shipped if e["output"] == "logits")
    vision = manifests["fp32"]["model"]["vision"]
    found["processor"] = vision["processor"]["name"] if vision else None
    found |= _behaviour(engines["fp32"], checkpoint, vision is not None)
    found["torch_free"] = _runs_without_torch(engines["fp32"], folder, vision is not None)
    wrong = [key for key in ("greedy", "batch", "chunks", "prefix") if found[key] is False]
    if found["int8_error"] > INT8_LIMIT:
        wrong.append(f"INT8 error {found['int8_error']:.2g}")
    found["parity"] = not wrong
    found["reason"] = f"differs: {', '.join(wrong)}" if wrong else None


def _behaviour(engine: Path, checkpoint: Path, with_images: bool) -> dict[str, Any]:
    """Greedy tokens against transformers', and of the engine against itself."""
    import glmcompile
    from glmcompile.errors import InputError

    images = drawn_images() if with_images else []
    requests = [{"prompt": "What is shown here, and where would you tap?", "images": images[:1]}]
    if with_images:
        requests.append({"prompt": "Compare these two.", "images": images})
    requests.append({"prompt": "A prompt of text alone, a little longer than a window of tokens."})

    def answer(**options: Any) -> Callable[[list[dict[str, Any]]], list[tuple[int, ...]]]:
        def answered(asked: list[dict[str, Any]]) -> list[tuple[int, ...]]:
            with glmcompile.load(engine, kv_cache_bytes=64 << 20, **options) as opened:
                made = opened.generate_many(
                    [{**each, "max_tokens": TOKENS, "ignore_eos": True} for each in asked]
                )
            return [each.token_ids for each in made]

        return answered

    found: dict[str, Any] = {"several_images": None}
    if with_images:
        found["several_images"] = True
        try:
            answer()(requests[1:2])
        except InputError:
            found["several_images"] = False
            del requests[1]
    together = answer()(requests)
    alone = [answer()([each])[0] for each in requests]
    expected = _transformers_answers(engine, checkpoint, requests)
    found["greedy"] = all(
        own[: len(theirs)] == theirs for own, theirs in zip(together, expected, strict=True)
    )
    found["batch"] = together == alone
    found["prefix"] = answer()([*requests, *requests])[len(requests) :] == together
    try:
        found["chunks"] = answer(max_batched_tokens=24, max_sequences=1)(requests) == together
    except InputError:  # an image has to be computed in one step
        found["chunks"] = None
    return found


def _transformers_answers(
    engine: Path, checkpoint: Path, requests: list[dict[str, Any]]
) -> list[tuple[int, ...]]:
    """The greedy answers of transformers' eager model, step by step over the whole sequence.

    Its token ids and image arrays are the engine's, which compiling has compared. An answer ends
    with an image token, which transformers takes for one without features.
    """
    import torch

    from glmcompile.artifact import open_artifact
    from glmcompile.checkpoint import open_checkpoint
    from glmcompile.runtime.input_processor import InputProcessor, Prompt

    contract = open_artifact(engine).model
    source = open_checkpoint(checkpoint)
    inputs = InputProcessor(engine, contract)
    model: Any = source.model_class.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    for request in requests:
        ready = inputs(Prompt(prompt=request["prompt"], images=request.get("images", ())))
        arguments: dict[str, Any] = {}
        images = [span.image for span in ready.images]
        if images:
            parts = [_features(model, source, image) for image in images]
            joined = torch.cat(parts)
            output = source.structure.form.split(joined, contract.hidden_size)
            arguments["mm_encoder_outputs"] = {"image": output}
        ids, positions = list(ready.token_ids), ready.positions
        prompt = len(ids)
        for _ in range(TOKENS):
            step = torch.tensor(ids)[None]
            made = {"input_ids": step, "use_cache": False, **arguments}
            if source.structure.takes_positions:
                after = np.arange(prompt, len(ids)) + ready.position_offset
                whole = np.concatenate([positions, np.tile(after, (len(positions), 1))], axis=1)
                at = torch.from_numpy(whole)
                made["position_ids"] = at[:, None] if len(at) > 1 else at
            for name, kind in source.structure.types.items():
                kinds = kind * (step == (contract.image_token_id or -1)).long()
                if contract.spans == "whole_prompt":
                    kinds[:, prompt:] = 1
                made[name] = kinds
            made["mm_encoder_outputs"] = (
                {"image": source.structure.form.split(joined, contract.hidden_size)}
                if images
                else None
            )
            if not images:
                made.pop("mm_encoder_outputs")
            with torch.no_grad():
                logits = model(**made).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == contract.image_token_id:
                break
        answers.append(tuple(ids[prompt:]))
    return answers


def _features(model: Any, source: Any, image: Any) -> Any:
    """Image features by transformers' own encoder."""
    import torch

    from glmcompile.export.components import features_owner

    arguments = {name: torch.from_numpy(array) for name, array in image.inputs.items()}
    for name in source.structure.fixed:
        if name not in arguments:
            arguments[name] = torch.tensor([image.grid_thw])
    with torch.no_grad():
        output = features_owner(model).get_image_features(**arguments, return_dict=True)
    return source.structure.form.join(output)


def _runs_without_torch(engine: Path, folder: Path, with_images: bool) -> bool:
    """Whether an engine answers in a process where torch and torchvision cannot be imported."""
    image = folder / "image.png"
    drawn_images()[0].save(image)
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "import glmcompile\n"
        f"with glmcompile.load({str(engine)!r}, kv_cache_bytes=64 << 20) as engine:\n"
        f"    images = [{str(image)!r}] if {with_images} else []\n"
        "    engine.generate(prompt='Hello', images=images, max_tokens=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY)
    return done.returncode == 0


def drawn_images() -> list[Any]:
    """Two images of different sizes, the same in every run."""
    from glmcompile.discover.processors import drawn

    return [drawn(*size) for size in SIZES]


def _read() -> dict[str, Any]:
    return json.loads(JSON.read_text()) if JSON.is_file() else {"types": []}


def _machine() -> dict[str, Any]:
    from importlib.metadata import version

    from glmcompile.bench.machine import cpu_model, git_commit

    packages = ("glmcompile", "onnxruntime", "torch", "transformers")
    return {
        "machine": cpu_model(),
        "versions": {name: version(name) for name in packages},
        "git_commit": git_commit(),
        "int8_limit": INT8_LIMIT,
    }


@main.command()
def table() -> None:
    """Write the table from the rows."""
    _write_table(_read())


def _write_table(result: dict[str, Any]) -> None:
    rows = result["types"]
    good = [each for each in rows if each["parity"]]
    lines = [
        "# Coverage",
        "",
        f"{len(good)} of {len(rows)} types work, {sum(r['torch_free'] for r in good)} of them "
        "without torch at run time. Tiny random checkpoints with published proportions; "
        f"`python benchmarks/coverage.py run` (transformers {_version(result)}).",
        "",
        "| type | works | FP32 error, vision / decoder | INT8 error | several images | torch-free |"
        " image processor | why not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(each) for each in rows]
    MARKDOWN.write_text("\n".join(lines) + "\n")


def _line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        value = row.get(key)
        return "" if value is None else f"{value:.1e}"

    def mark(value: bool | None) -> str:
        return {True: "yes", False: "no", None: ""}[value]

    cells = [
        row["type"],
        mark(row["parity"]),
        f"{number('vision_encoder_error')} / {number('decoder_error')}".strip(" /"),
        number("int8_error"),
        mark(row.get("several_images")),
        mark(row["torch_free"]) if row["parity"] else "",
        row.get("processor") or "",
        (row["reason"] or "").replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


def _version(result: dict[str, Any]) -> str:
    return str(result.get("versions", {}).get("transformers", "?"))


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
