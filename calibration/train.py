"""The command `python -m calibration.train`: trains the reference checkpoint on two CPU cores.

First the vision encoder alone learns to read cells (dense targets, cheap steps), then all of the
model learns to answer while the encoder goes on reading, last the decoder alone. A run that starts
from a checkpoint does the same with agents' conversations and larger screens among the questions.
Everything follows from the seed and the step, so a run can stop and resume from its state file at
any time.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Glm4vForConditionalGeneration

from calibration.batches import IGNORE, Batch, Batches, DrawBatch, Packer, draw_batch
from calibration.conversations import draw_mixed_batch
from calibration.model import make_config, make_model, make_processor, make_tokenizer, save
from calibration.muon import Muon
from calibration.network import Trainee, answer_loss
from calibration.processor import ImageTextProcessor
from calibration.tasks import is_correct

REFERENCE = Path(__file__).parent / "reference"
WARMUP = 40
SAVE_SECONDS = 180
EVALUATE_EVERY = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m calibration.train", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=REFERENCE, help="folder of the checkpoint")
    add("--state", type=Path, required=True, help="file to save training to and resume from")
    add("--initial", type=Path, help="checkpoint to go on from, with agents' conversations")
    add("--vision-steps", type=int, default=440, help="steps of the encoder alone")
    add("--freeze-from", type=int, default=750, help="step from which the encoder is left alone")
    add("--steps", type=int, default=1640, help="steps in all")
    add("--decay-from", type=float, default=0.87, help="part of the steps at the full rate")
    add("--patches", type=int, default=288 * 16, help="image patches a batch")
    add("--questions", type=int, default=12, help="questions a screen")
    add("--rate", type=float, default=2e-3, help="learning rate")
    add("--ema", type=float, default=0.99, help="decay of the averaged weights that are saved")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    return parser.parse_args()


def make_optimizers(trainee: Trainee, rate: float, single: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside of blocks, AdamW for embeddings, heads, convolutions, norms.

    single: Muon in float32, not as in torch in bfloat16, which takes five times as long as the rest
        of a step where the CPU has no such arithmetic.
    """
    matrices, others = [], []
    for name, parameter in trainee.named_parameters():
        inner = ".layers." in name or ".blocks." in name or ".merger." in name
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    muon: torch.optim.Optimizer = (
        Muon(matrices, rate)
        if single
        else torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
    )
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)]


def rate_at(step: int, arguments: argparse.Namespace) -> float:
    """Factor of the learning rate: a warm-up at the start of each phase, a linear end.

    The encoder's phase has such an end, too, where the encoder is left alone after it.
    """
    if step >= arguments.vision_steps:
        start, end = arguments.vision_steps, arguments.steps
        decay_from = arguments.decay_from * end
    else:
        start, end = 0, arguments.vision_steps
        decay_from = arguments.decay_from * end if arguments.freeze_from <= end else end
    left = (end - step) / (end - decay_from) if step > decay_from else 1.0
    return min(1.0, (step - start + 1) / WARMUP) * max(left, 0.01)


@torch.no_grad()
def teacher_forced(logits: torch.Tensor, batch: Batch, packer: Packer) -> dict[str, list[int]]:
    """Per kind [correct, asked], each token predicted after the correct ones before it."""
    at = batch.labels != IGNORE
    predicted = torch.full_like(batch.labels, packer.end)
    predicted[at] = logits.argmax(-1)
    scores: dict[str, list[int]] = {}
    for row, questions in enumerate(batch.questions):
        for number, question in enumerate(questions, start=1):
            where = at[row] & (batch.segment[row] == number)
            ids = predicted[row][where].tolist()
            answer = packer.tokenizer.decode(ids[:-1])
            correct = ids[-1] == packer.end and is_correct(question, answer)
            score = scores.setdefault(question.kind, [0, 0])
            score[0] += correct
            score[1] += 1
    return scores


@torch.no_grad()
def validate(trainee: Trainee, packer: Packer, answering: bool, draw: DrawBatch) -> str:
    """Accuracy on a fixed slice of the calibration split, as one line."""
    words, scores = [], defaultdict(Counter)
    for i in range(4 if draw is draw_batch else 8):
        batch = draw("calibration", Random(f"validate/{i}"), packer, 288 * 16, 8)
        cells = trainee.encode(batch.images)
        words.append(trainee.read_cells(cells, batch)["word_accuracy"])
        if answering:
            logits = trainee.answer(cells, batch)
            for kind, (right, asked) in teacher_forced(logits, batch, packer).items():
                scores[kind].update(right=right, asked=asked)
    line = f"validation: words {torch.stack(words).mean():.3f}"
    for kind, score in scores.items():
        if score["asked"]:
            line += f" {kind} {score['right'] / score['asked']:.2f}"
    return line


class Run:
    """Model, optimizers and averaged weights of one training run, and their state file."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        tokenizer = make_tokenizer()
        self.processor: ImageTextProcessor = make_processor(tokenizer)
        self.packer = Packer(tokenizer)
        model: Glm4vForConditionalGeneration = make_model(
            make_config(tokenizer), tokenizer, arguments.seed
        )
        if arguments.initial is not None:
            model.load_state_dict(load_file(arguments.initial / "model.safetensors"))
        self.trainee = Trainee(model)
        self.optimizers = make_optimizers(
            self.trainee, arguments.rate, single=arguments.initial is not None
        )
        self.average = {k: v.clone() for k, v in self.trainee.state_dict().items()}
        self.step = 0

    def load(self) -> None:
        """Resumes from the state file if there is one."""
        if not self.arguments.state.exists():
            return
        state = torch.load(self.arguments.state, weights_only=True)
        self.trainee.load_state_dict(state["model"])
        self.average, self.step = state["average"], state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Writes the state file and, with averaged weights, the checkpoint."""
        state = {
            "model": self.trainee.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        temporary = self.arguments.state.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.arguments.state)
        with self.averaged():
            save(self.trainee.model, self.processor, self.arguments.output)

    def averaged(self) -> "_Swapped":
        """Context in which the model has the averaged weights."""
        return _Swapped(self.trainee, self.average)

    def train_step(self, batch: Batch) -> dict[str, float]:
        factor = rate_at(self.step, self.arguments)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.arguments.rate * factor
        conversing = self.arguments.initial is not None
        frozen = self.step >= self.arguments.freeze_from
        with torch.set_grad_enabled(not frozen):
            cells = self.trainee.encode(batch.images)
            read = self.trainee.read_cells(cells, batch)
        loss = read["kind"] + read["word"] + 5 * read["centre"] + 2 * read["badge"]
        if conversing:
            loss = loss + 2 * read["focus"]
        if self.step >= self.arguments.vision_steps:
            read["answer"] = answer_loss(self.trainee.answer(cells, batch), batch)
            read |= (sought := self.trainee.seek(batch))
            loss = read["answer"] + sum(sought.values()) + (0 if frozen else loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), 2.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.arguments.ema, self.step / (self.step + 10))
        for name, value in self.trainee.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return {name: value.item() for name, value in read.items()}


class _Swapped:
    def __init__(self, trainee: Trainee, average: dict[str, torch.Tensor]):
        self.trainee, self.average = trainee, average

    def __enter__(self) -> None:
        self.kept = {k: v.clone() for k, v in self.trainee.state_dict().items()}
        self.trainee.load_state_dict(self.average)

    def __exit__(self, *_) -> None:
        self.trainee.load_state_dict(self.kept)


def log(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    run = Run(arguments)
    run.load()
    log(json.dumps({k: str(v) for k, v in vars(arguments).items()}))
    draw = draw_batch if arguments.initial is None else draw_mixed_batch
    batches = Batches(
        run.packer, arguments.patches, arguments.questions, run.step, arguments.seed, draw
    )
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
    saved = time.monotonic()
    while run.step < arguments.steps:
        begun = time.monotonic()
        losses = run.train_step(next(loader))
        if run.step % 10 == 0:
            parts = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            log(f"step {run.step} {time.monotonic() - begun:.2f} s {parts}")
        if run.step % EVALUATE_EVERY == 0:
            with run.averaged():
                answering = run.step > arguments.vision_steps
                log(validate(run.trainee, run.packer, answering, draw))
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save()
            saved = time.monotonic()
    run.save()
    with run.averaged():
        log(validate(run.trainee, run.packer, True, draw))


if __name__ == "__main__":
    main()
