"""Accuracy of an engine, alone or against a baseline of the same checkpoint, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.errors import InputError
from glmcompile.evaluate import intervals, metrics
from glmcompile.evaluate.samples import EvaluationSample, evaluation_samples
from glmcompile.progress import Progress, Silent
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.runtime.teacher_forcing import AnswerEncoder, TeacherForcing

# Longest answer waited for, over twice the longest expected one.
_ANSWER_TOKENS = 64
# Plain text is cut here: attention over more says little about quantization and costs much.
_TEXT_TOKENS = 1024
# Samples that are prepared and answered together.
_BATCH = 16


def labels(engine: Engine, baseline: Engine | None) -> tuple[str, str | None]:
    """What figures of the two engines are filed under: their precisions, "int8" and "fp32"."""
    precision = str(engine.manifest["precision"])
    if baseline is None:
        return precision, None
    other = str(baseline.manifest["precision"])
    return precision, other if other != precision else f"{other} baseline"


def evaluate(
    engine: Engine,
    baseline: Engine | None = None,
    *,
    samples: str | Path | None = None,
    count: int = 405,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Exact match of greedy answers, and teacher-forced figures on the same samples.

    samples: a folder (see evaluate.samples); None takes the bundled evaluation split.
    count: at most this many samples.
    Returns {"source": str, "exact_match": {...}, "teacher_forcing": {...}}, keys that do not apply
    left out. Shares are 0 to 1; `difference` is the engine's share minus the baseline's.
    Raises InputError or CalibrationError for samples that cannot be used, and InputError for
    engines of different vocabularies.
    """
    progress = progress or Silent()
    if baseline is not None and baseline.model.vocab_size != engine.model.vocab_size:
        raise InputError(
            f"{baseline.path} and {engine.path} have vocabularies of {baseline.model.vocab_size} "
            f"and {engine.model.vocab_size} tokens; compare engines of one checkpoint."
        )
    chosen = evaluation_samples(engine.model, samples, count)
    result: dict[str, Any] = {
        "source": "bundled evaluation split" if samples is None else Path(samples).resolve().name
    }
    questions = [sample for sample in chosen if sample.correct is not None]
    if questions:
        result["exact_match"] = _exact_match(engine, baseline, questions, progress)
    result["teacher_forcing"] = _teacher_forcing(engine, baseline, chosen, progress)
    return result


def _exact_match(
    engine: Engine,
    baseline: Engine | None,
    samples: Sequence[EvaluationSample],
    progress: Progress,
) -> dict[str, Any]:
    name, other = labels(engine, baseline)
    judged = {name: _judge(engine, samples, name, progress)}
    if baseline is not None and other is not None:
        judged[other] = _judge(baseline, samples, other, progress)
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    result: dict[str, Any] = {"samples": len(samples)}
    result |= {
        label: asdict(intervals.wilson(sum(right), len(right))) for label, right in judged.items()
    }
    result["by_kind"] = {
        kind: {"samples": sum(sample.kind == kind for sample in samples)}
        | {label: _share(right, samples, kind) for label, right in judged.items()}
        for kind in kinds
    }
    if other is not None:
        result["difference"] = asdict(intervals.paired_difference(judged[name], judged[other]))
        result["difference"]["method"] = intervals.METHOD
    result["confidence"] = intervals.CONFIDENCE
    return result


def _judge(
    engine: Engine, samples: Sequence[EvaluationSample], label: str, progress: Progress
) -> list[bool]:
    """Whether the engine's greedy answer to each sample is correct."""
    done = progress.stage(f"Answering, {label}", len(samples))
    sampling = SamplingParams(max_tokens=_ANSWER_TOKENS)
    right: list[bool] = []
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        answers = engine.generate_many(
            [
                {"prompt": sample.prompt, "images": sample.images, "sampling": sampling}
                for sample in batch
            ]
        )
        for sample, answer in zip(batch, answers, strict=True):
            assert sample.correct is not None
            right.append(sample.correct(answer.text))
        done(len(right))
    return right


def _share(right: Sequence[bool], samples: Sequence[EvaluationSample], kind: str) -> float:
    of_kind = [r for r, sample in zip(right, samples, strict=True) if sample.kind == kind]
    return sum(of_kind) / len(of_kind)


def _teacher_forcing(
    engine: Engine,
    baseline: Engine | None,
    samples: Sequence[EvaluationSample],
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity and, against a baseline, top-1 agreement and KL over the known answers' tokens."""
    name, other = labels(engine, baseline)
    encode = AnswerEncoder(engine.path, engine.model)
    model = TeacherForcing(engine.path, engine.model, engine.options.threads)
    reference = (
        TeacherForcing(baseline.path, baseline.model, baseline.options.threads)
        if baseline is not None
        else None
    )
    done = progress.stage("Comparing predictions" if reference else "Predicting", len(samples))
    scores: list[metrics.TokenScores] = []
    reference_nll: list[NDArray[np.float64]] = []
    for index, sample in enumerate(samples, 1):
        token_ids, images, first = encode(sample.prompt, sample.answer, sample.images)
        if not sample.prompt and not sample.images:
            token_ids = token_ids[:_TEXT_TOKENS]
        rows = range(first - 1, len(token_ids) - 1)
        targets = np.asarray(token_ids[first:], np.int64)
        logits = model(token_ids, images, rows)["logits"]
        expected = logits if reference is None else reference(token_ids, images, rows)["logits"]
        scores.append(metrics.score(expected, logits, targets))
        if reference is not None:
            reference_nll.append(metrics.negative_log_likelihood(expected, targets))
        done(index)
    nll = np.concatenate([score.nll for score in scores])
    answers = any(sample.prompt or sample.images for sample in samples)
    result: dict[str, Any] = {
        "samples": len(samples),
        "tokens": len(nll),
        "scope": "answer tokens" if answers else "tokens of text",
        "perplexity": {name: metrics.perplexity(nll)},
    }
    if other is not None:
        before = metrics.perplexity(np.concatenate(reference_nll))
        result["perplexity"][other] = before
        result["perplexity_increase"] = result["perplexity"][name] / before - 1
        result["top1_agreement"] = float(np.concatenate([s.agrees for s in scores]).mean())
        result["kl_divergence"] = float(np.concatenate([s.kl for s in scores]).mean())
    return result
