"""What is measured: the calls to a worker, and the figures that its answers give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

import calibration
from calibration.texts import texts
from glmcompile.runtime.prompt import PromptBuilder

Answers = list[dict[str, Any]]

PREFILL = (128, 512, 2048)
CONTEXTS = (64, 1024, 4096)
DECODED = 64
REQUESTS = (1, 4, 8, 16)
REQUEST_TOKENS = 256
ANSWER_TOKENS = 64
ACTION_TOKENS = 60
SCREEN = (1080, 2400)
SMALL = (336, 336)
STEPS = {"first": 0, "later": 4}  # earlier steps in the conversation
PLACEHOLDER = "<|image|>"  # GLM-4V's image token
SYSTEM = """You are an agent that operates a phone. At every step you see a screenshot and decide on
one action that brings the task forward. First reason briefly between <think> and </think>, then
give the action between <answer> and </answer>. These are the actions:
do(action="Launch", app="name") starts an app.
do(action="Tap", element=[x,y]) taps a place; x and y run from 0 to 999 over width and height.
do(action="Type", text="words") types into the field that has the focus.
do(action="Swipe", start=[x,y], end=[x,y]) swipes, for instance to scroll.
do(action="Back") goes back; do(action="Wait", duration="2 seconds") waits for a page to load.
finish(message="result") ends the task.
Before you act, check whether the current app is the right one. If a page has not loaded, wait.
If a tap has no effect, move it a little and try once more. Do what the task says, nothing else."""
TASK = "Open the settings, turn on airplane mode and tell me which version the system has."
THOUGHT = (
    "<think>The list does not show the entry yet, so I scroll down further.</think>"
    '<answer>do(action="Swipe", start=[500,{y}], end=[500,240])</answer>'
)
SCREEN_INFO = '** Screen Info **\n\n{"current_app": "Settings"}'


@dataclass(frozen=True)
class Figure:
    """A column of the results. key: "<quantity>.<case>"."""

    key: str
    title: str
    unit: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Measurement:
    """A call that is timed.

    arguments: of the worker's `call`, for a repetition; every peer gets the same.
    figures: key and value of what the answer tells.
    """

    name: str
    call: str
    arguments: Callable[[int], dict[str, Any]]
    figures: Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Workload:
    figures: tuple[Figure, ...]
    measurements: tuple[Measurement, ...]


def text(checkpoint: Path) -> Workload:
    """Prefill, decode and throughput of prompts of prose; none repeats another's beginning."""
    prompts = PromptBuilder(checkpoint, None)
    passages = "\n\n".join([*texts("evaluation"), *texts("calibration")])
    stream = prompts.tokenizer.encode(passages, add_special_tokens=False).ids

    def request(tokens: int, index: int) -> dict[str, Any]:
        # A stride that shares no factor with usual lengths visits every place before repeating.
        start = index * 1009 % len(stream)
        return {"token_ids": list(islice(cycle(stream), start, start + tokens))}

    def arguments(tokens: int, answer: int, count: int, repetition: int) -> dict[str, Any]:
        first = repetition * count
        return {
            "requests": [request(tokens, first + index) for index in range(count)],
            "tokens": answer,
        }

    def generate(
        key: str, tokens: int, answer: int, count: int, rate: Callable[[Answers], float]
    ) -> Measurement:
        return Measurement(
            key,
            "generate",
            partial(arguments, tokens, answer, count),
            lambda answers: {key: rate(answers)},
        )

    measurements = [
        *(generate(f"prefill.{n}", n, 1, 1, partial(_prefill_rate, n)) for n in PREFILL),
        *(generate(f"decode.{n}", n, DECODED + 1, 1, decode_rate) for n in CONTEXTS),
        *(
            generate(f"requests.{n}", REQUEST_TOKENS, ANSWER_TOKENS, n, throughput)
            for n in REQUESTS
        ),
    ]
    figures = [
        *(Figure(f"prefill.{n}", f"prefill, {n:,} tokens", "tok/s") for n in PREFILL),
        *(Figure(f"decode.{n}", f"decode after {n:,} tokens", "tok/s") for n in CONTEXTS),
        *(
            Figure(f"requests.{n}", f"{n} request{'s' * (n > 1)} at once", "output tok/s")
            for n in REQUESTS
        ),
    ]
    return Workload(tuple(figures), tuple(measurements))


def agent(checkpoint: Path, pictures: Path) -> Workload:
    """A phone agent's steps: a screenshot, its conversation, an action of a fixed length."""
    prompts = PromptBuilder(checkpoint, PLACEHOLDER)
    screens = _draw(pictures, SCREEN, 8)
    # 1080 x 2400 become 1092 x 2408 pixels: 39 x 86 places of 28 pixels.
    image_tokens = [prompts.tokenizer.token_to_id(PLACEHOLDER)] * (39 * 86)

    def arguments(history: int, repetition: int) -> dict[str, Any]:
        messages = conversation(history)
        chat, _ = prompts.split_images(messages)
        prompt = prompts.chat(chat)
        ids = prompts.encode(prompt, [image_tokens])
        image = screens[(repetition + history) % len(screens)]
        request = {"token_ids": ids, "text": prompt.text, "images": [str(image)]}
        return {"requests": [request], "tokens": ACTION_TOKENS}

    quantities = {
        "action": "the complete action",
        "first_token": "its first token",
        "vision": "vision encoding",
    }
    return Workload(
        tuple(
            Figure(f"{quantity}.{step}", f"{step} step: {title}", "s", higher_is_better=False)
            for step in STEPS
            for quantity, title in quantities.items()
        ),
        tuple(
            Measurement(step, "generate", partial(arguments, history), partial(_step_times, step))
            for step, history in STEPS.items()
        ),
    )


def conversation(history: int) -> list[dict[str, Any]]:
    """A chat as Open-AutoGLM sends it: earlier steps without their screenshots, then a new one."""
    asked = [f"{TASK}\n\n{SCREEN_INFO}", *[SCREEN_INFO] * history]
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for step, words in enumerate(asked[:-1]):
        messages.append({"role": "user", "content": [{"type": "text", "text": words}]})
        messages.append({"role": "assistant", "content": THOUGHT.format(y=700 + step)})
    shown = [{"type": "image", "image": "screenshot"}, {"type": "text", "text": asked[-1]}]
    return [*messages, {"role": "user", "content": shown}]


def vision(pictures: Path) -> Workload:
    """The vision encoder alone, on small images, screenshots, and both."""
    small, screens = _draw(pictures, SMALL, 4), _draw(pictures, SCREEN, 1)
    cases = {
        "small": ("336 x 336", small),
        "screenshot": ("1080 x 2400", screens),
        "mixed": ("4 of 336 x 336 and 1 of 1080 x 2400", [*small, *screens]),
    }

    def rate(case: str, seconds: float) -> dict[str, float]:
        return {f"images.{case}": len(cases[case][1]) / seconds}

    def arguments(images: list[Path], repetition: int) -> dict[str, Any]:
        return {"images": [str(image) for image in images]}

    return Workload(
        tuple(Figure(f"images.{case}", title, "images/s") for case, (title, _) in cases.items()),
        tuple(
            Measurement(case, "encode", partial(arguments, images), partial(rate, case))
            for case, (_, images) in cases.items()
        ),
    )


def decode_rate(answers: Answers) -> float:
    """Tokens per second after the first."""
    seconds = answers[0]["seconds"]
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def throughput(answers: Answers) -> float:
    """Output tokens of all requests over the whole time."""
    return sum(len(a["tokens"]) for a in answers) / max(a["seconds"][-1] for a in answers)


def _prefill_rate(tokens: int, answers: Answers) -> float:
    return tokens / answers[0]["seconds"][0]


def _step_times(step: str, answers: Answers) -> dict[str, float]:
    (answer,) = answers
    figures = {
        f"action.{step}": answer["seconds"][-1],
        f"first_token.{step}": answer["seconds"][0],
    }
    if "vision_seconds" in answer:
        figures[f"vision.{step}"] = answer["vision_seconds"]
    return figures


def _draw(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Screens of the evaluation split, enlarged to `size`, as PNG files."""
    return list(_drawn(folder, size, count))


def _drawn(folder: Path, size: tuple[int, int], count: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(calibration.samples("evaluation", count)):
        path = folder / f"{size[0]}x{size[1]}-{index}.png"
        if not path.is_file():
            sample.image.resize(size, Image.Resampling.LANCZOS).save(path)
        yield path
