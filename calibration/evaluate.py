"""The command `python -m calibration.evaluate`: a checkpoint's accuracy through transformers.

Greedy, in float32, one request at a time, through the processor and `generate`, as a user would.
"""

import argparse
import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from transformers import Glm4vForConditionalGeneration

from calibration.episodes import Messages, run_tasks
from calibration.layouts import SPLITS
from calibration.phone_tasks import TASK_KINDS, tasks
from calibration.processor import ImageTextProcessor
from calibration.tasks import KINDS, Sample, is_correct, samples

REFERENCE = Path(__file__).parent / "reference"


class Reference:
    """A checkpoint loaded in float32, and its greedy answers. Raises OSError if it is not there."""

    def __init__(self, folder: Path = REFERENCE):
        self.processor = ImageTextProcessor.from_pretrained(folder)
        self.model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def answer(self, sample: Sample, max_new_tokens: int = 32) -> str:
        """The text the model generates for the sample's picture and prompt."""
        content = [
            {"type": "image", "image": sample.image},
            {"type": "text", "text": sample.prompt},
        ]
        return self.reply([{"role": "user", "content": content}], max_new_tokens)

    @torch.inference_mode()
    def reply(self, messages: Messages, max_new_tokens: int = 32) -> str:
        """The text the model generates as the next turn; pictures as Pillow images or data URLs."""
        inputs = self.processor.apply_chat_template(
            [{**message, "content": _with_pictures(message["content"])} for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True)


def _with_pictures(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A message's content with the data URLs of its pictures opened."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "image": _open(part["image_url"]["url"])} if "image_url" in part else part
        for part in content
    ]


def _open(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def evaluate_phone(reference: Reference, split: str, count: int, seed: int, show: bool) -> None:
    """Prints how many of the simulated phone's tasks the checkpoint solves, kind by kind."""
    solved, tried = Counter(), Counter()
    episodes = run_tasks(reference.reply, tasks(split, count, seed))
    for episode in track(episodes, "working", count, transient=True):
        tried[episode.task.kind] += 1
        solved[episode.task.kind] += episode.solved
        if show and not episode.solved:
            print(episode.task.instruction, *episode.answers, sep="\n  ")
    _print_table(solved, tried, TASK_KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m calibration.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=REFERENCE)
    parser.add_argument("--split", choices=SPLITS, default="evaluation")
    parser.add_argument("-n", "--count", type=int, default=405)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--show-wrong", action="store_true", help="print each wrong answer")
    parser.add_argument("--phone", action="store_true", help="tasks on the phone, not questions")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reference = Reference(arguments.checkpoint)
    if arguments.phone:
        evaluate_phone(
            reference, arguments.split, arguments.count, arguments.seed, arguments.show_wrong
        )
        return
    right, asked = Counter(), Counter()
    chosen = samples(arguments.split, arguments.count, arguments.seed)
    for sample in track(chosen, "answering", arguments.count, transient=True):
        answer = reference.answer(sample)
        correct = is_correct(sample, answer)
        asked[sample.kind] += 1
        right[sample.kind] += correct
        if arguments.show_wrong and not correct:
            print(f"{sample.prompt}\n  expected {sample.answer}\n  answered {answer}")
    _print_table(right, asked, KINDS)


def _print_table(right: Counter, asked: Counter, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if asked[kind]:
            share = right[kind] / asked[kind]
            print(f"{kind:12} {right[kind]:4} of {asked[kind]:4}  {share:6.1%}")
    total, count = right.total(), asked.total()
    print(f"{'all':12} {total:4} of {count:4}  {total / count:6.1%}")


if __name__ == "__main__":
    main()
