"""Sampling against naive formulas and Hugging Face's logits processors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glmcompile.errors import InputError
from glmcompile.runtime.sampler import SamplingState, candidates, sample
from glmcompile.runtime.sampling_params import SamplingParams

VOCAB = 3000


def logits_of(seed: int, vocab: int = VOCAB, spread: float = 3.0) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(0, spread, vocab).astype(np.float32)
    values[: vocab // 10] = values[vocab // 10 : 2 * (vocab // 10)]  # ties
    return values


def naive_distribution(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Full sorts and sums, token by token."""
    scores = {id: float(value) / temperature for id, value in enumerate(logits)}
    if top_k:
        kth = sorted(scores.values(), reverse=True)[min(top_k, len(scores)) - 1]
        scores = {id: score for id, score in scores.items() if score >= kth}
    largest = max(scores.values())
    weights = {id: np.exp(score - largest) for id, score in scores.items()}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    reached = 0.0
    for id in sorted(weights, key=lambda id: (-weights[id], id)):
        if reached >= top_p and top_p < 1:
            break
        kept[id] = weights[id] / total
        reached += kept[id]
    total = sum(kept.values())
    return {id: weight / total for id, weight in kept.items()}


def state(prompt: tuple[int, ...] = (), end: tuple[int, ...] = (), **options: Any) -> SamplingState:
    return SamplingState(SamplingParams(**options), prompt, end)


def draw_many(options: dict[str, Any], logits: NDArray[np.float32], count: int) -> list[int]:
    chooser = state(**options)
    tokens = []
    for _ in range(count):
        token = sample(logits.copy()[None], [chooser])[0].token
        chooser.accept(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (50, 1.0), (0, 0.9), (0, 0.999), (40, 0.5), (9999, 0.1)],
)
def test_the_distribution_equals_the_naive_one(
    temperature: float, top_k: int, top_p: float
) -> None:
    for seed in range(3):
        logits = logits_of(seed, spread=seed + 0.5)
        ids, probabilities = candidates(logits, temperature, top_k, top_p)
        expected = naive_distribution(logits, temperature, top_k, top_p)
        assert set(ids.tolist()) == set(expected)
        np.testing.assert_allclose(
            probabilities, [expected[id] for id in ids.tolist()], rtol=1e-5, atol=1e-12
        )


def test_the_distribution_equals_hugging_face() -> None:
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
    from transformers.generation import TopPLogitsWarper

    logits = np.random.default_rng(5).normal(0, 3, VOCAB).astype(np.float32)
    warp = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(60), TopPLogitsWarper(0.8)]
    )
    theirs = warp(torch.zeros((1, 1), dtype=torch.long), torch.tensor(logits)[None]).softmax(-1)[0]
    ids, probabilities = candidates(logits, 0.7, 60, 0.8)
    assert set(ids.tolist()) == set(torch.nonzero(theirs)[:, 0].tolist())
    np.testing.assert_allclose(probabilities, theirs[ids].numpy(), rtol=1e-4)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    tokens = Counter(draw_many({"temperature": 1.0, "seed": 3}, logits, 8000))
    for id, probability in enumerate((0.5, 0.2, 0.2, 0.1)):
        assert tokens[id] / 8000 == pytest.approx(probability, abs=0.02)


def test_a_vanishing_temperature_takes_the_largest() -> None:
    logits = logits_of(3)
    assert sample(logits.copy()[None], [state(temperature=1e-30)])[0].token == logits.argmax()
    assert sample(logits.copy()[None], [state(temperature=2e-5)])[0].token == logits.argmax()


def test_temperature_zero_takes_the_largest() -> None:
    logits = np.stack([logits_of(seed) for seed in range(4)])
    expected = logits.argmax(axis=1).tolist()
    chosen = sample(logits.copy(), [state() for _ in range(4)])
    assert [item.token for item in chosen] == expected
    mixed = [state(), state(temperature=1.0, top_k=1), state(logprobs=0), state(min_tokens=1)]
    assert [item.token for item in sample(logits.copy(), mixed)] == expected


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.7])
def test_repetition_penalty_equals_hugging_face(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, answer = (3, 3, 9, 700), (11, 3, 12)
    chooser = state(prompt, repetition_penalty=penalty)
    for token in answer:
        chooser.accept(token)
    logits = logits_of(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + answer]), torch.tensor(logits)[None]
    )[0]
    chooser.mask(logits)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-6)


def test_frequency_and_presence_penalties_count_the_answer_alone() -> None:
    chooser = state((5, 6), frequency_penalty=0.2, presence_penalty=-0.5)
    for token in (7, 8, 7, 7):
        chooser.accept(token)
    logits = logits_of(2)
    expected = logits.copy()
    expected[7] -= 0.2 * 3 - 0.5
    expected[8] -= 0.2 * 1 - 0.5
    chooser.mask(logits)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_an_end_token_waits_for_min_tokens() -> None:
    logits = np.array([0.0, 9.0, 8.0, 1.0], np.float32)
    chooser = state(end=(1, 2), min_tokens=2)
    tokens = []
    for _ in range(3):
        tokens.append(sample(logits.copy()[None], [chooser])[0].token)
        chooser.accept(tokens[-1])
    assert tokens == [3, 3, 1]


def test_a_seed_gives_the_same_answer_whatever_the_batch() -> None:
    logits = [logits_of(step) for step in range(12)]

    def answer(others: int) -> list[int]:
        mine = state(temperature=1.2, top_p=0.95, seed=7)
        rest = [state(temperature=1.2, seed=number) for number in range(others)]
        tokens = []
        for row in logits:
            batch = np.stack([row] * (others + 1))
            tokens.append(sample(batch, [*rest, mine])[-1].token)
            mine.accept(tokens[-1])
        return tokens

    assert answer(0) == answer(1) == answer(5)
    assert len(set(answer(0))) > 3


def test_unseeded_answers_differ() -> None:
    flat = np.zeros(VOCAB, np.float32)
    options = {"temperature": 1.0}
    assert draw_many(options, flat, 8) != draw_many(options, flat, 8)


def test_logprobs_are_of_the_unchanged_logits() -> None:
    logits = logits_of(4)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    chooser = state((int(logits.argmax()),), repetition_penalty=5.0, logprobs=3)
    chosen = sample(logits.copy()[None], [chooser])[0]
    assert chosen.logprob == pytest.approx(expected[chosen.token])
    best = np.sort(expected)[::-1][:3]
    assert [value for _, value in chosen.top_logprobs] == pytest.approx(best.tolist())
    assert chosen.top_logprobs[0][0] == logits.argmax()
    assert chosen.token != logits.argmax()
    assert sample(logits.copy()[None], [state(logprobs=0)])[0].top_logprobs == ()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1; expected an integer of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5 and max_tokens 4"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"frequency_penalty": 3}, "frequency_penalty is 3"),
        ({"presence_penalty": True}, "presence_penalty is True"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "stop is"),
        ({"stop_token_ids": [-4]}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"heat": 1}, "no sampling option 'heat'; there are max_tokens"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        SamplingParams.from_options(options)


def test_options_accept_numpy_numbers_and_a_single_stop_string() -> None:
    params = SamplingParams(top_k=np.int64(3), temperature=np.float32(0.5), stop="end")  # type: ignore[arg-type]
    assert (params.top_k, params.temperature, params.stop) == (3, 0.5, ("end",))
