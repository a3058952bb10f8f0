"""Logits processors, rows that fail alone, and options that only a vocabulary can judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glmcompile.errors import ComputeError, InputError
from glmcompile.runtime.sampler import Sampled, SamplingState, candidates, sample
from glmcompile.runtime.sampling_params import SamplingParams
from tests.engines import TinyEngine

VOCAB = 500


def logits_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def state(end: tuple[int, ...] = (), grammar: Any = None, **options: Any) -> SamplingState:
    return SamplingState(SamplingParams(**options), (1, 2), end, grammar)


class Only:
    """A constraint that allows a fixed set of tokens."""

    finished = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.accepted: list[int] = []

    def mask(self, logits: NDArray[np.float32]) -> None:
        kept = logits[self.tokens].copy()
        logits[:] = -np.inf
        logits[self.tokens] = kept

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def forced(self) -> list[int]:
        return self.tokens if len(self.tokens) == 1 else []


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (40, 0.9), (0, 0.7)])
def test_min_p_equals_hugging_face(min_p: float, top_k: int, top_p: float) -> None:
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
    from transformers.generation import MinPLogitsWarper, TopPLogitsWarper

    logits = logits_of(1)
    warp = LogitsProcessorList([TemperatureLogitsWarper(1.3)])
    if top_k:
        warp.append(TopKLogitsWarper(top_k))
    warp.extend([TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])
    theirs = warp(torch.zeros((1, 1), dtype=torch.long), torch.tensor(logits)[None]).softmax(-1)[0]
    ids, probabilities = candidates(logits, 1.3, top_k, top_p, min_p)
    assert set(ids.tolist()) == set(torch.nonzero(theirs)[:, 0].tolist())
    np.testing.assert_allclose(probabilities, theirs[ids].numpy(), rtol=1e-4)


def test_a_bias_is_added_and_can_force_or_forbid_a_token() -> None:
    logits = logits_of(2)
    best = int(logits.argmax())
    expected = logits.copy()
    expected[[3, 7]] += [1.5, -2.0]
    biased = logits.copy()
    state(logit_bias={3: 1.5, "7": -2}).mask(biased)
    np.testing.assert_array_equal(biased, expected)
    assert sample(logits.copy()[None], [state(logit_bias={9: 100})]) == [Sampled(9)]
    assert sample(logits.copy()[None], [state(logit_bias={best: -100})]) != [Sampled(best)]


def test_processors_leave_the_fast_path_when_they_have_done_their_work() -> None:
    chooser = state(end=(4,), min_tokens=2)
    for expected in (False, False, True):
        assert chooser.takes_argmax is expected
        chooser.accept(5)
    assert not state(logit_bias={1: 1.0}).takes_argmax
    assert not state(grammar=Only(3)).takes_argmax
    assert state(logit_bias={}).takes_argmax


def test_a_grammar_that_can_only_end_goes_before_min_tokens() -> None:
    chooser = state(end=(4, 5), grammar=Only(5), min_tokens=9)
    assert sample(logits_of(3)[None], [chooser]) == [Sampled(5)]
    chooser = state(end=(4, 5), grammar=Only(5, 6), min_tokens=9)
    assert sample(logits_of(3)[None], [chooser]) == [Sampled(6)]


def test_forced_tokens_come_from_the_grammar_unless_logprobs_are_wanted() -> None:
    grammar = Only(8)
    chooser = state(grammar=grammar)
    assert chooser.forced() == [8]
    chooser.accept(8)
    assert grammar.accepted == [8]
    assert state(grammar=Only(8), logprobs=0).forced() == []
    assert state().forced() == []
    assert not state().finished


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[2, 3]] = 0.0

    class Highest:
        def random(self) -> float:
            return 1.0  # above what a generator gives, as rounding may make the product

    for options in ({}, {"top_k": 50}, {"top_p": 0.999999999}, {"min_p": 1e-9}):
        chooser = state(temperature=1.0, **options)
        chooser._generator = Highest()  # type: ignore[assignment]
        assert sample(logits.copy()[None], [chooser]) == [Sampled(3)]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}])
def test_a_row_that_is_not_numbers_fails_alone(broken: float, options: dict[str, Any]) -> None:
    rows = np.stack([logits_of(seed) for seed in range(3)])
    alone = [sample(row.copy()[None], [state(**options)])[0] for row in rows]
    if broken == -np.inf:
        rows[1] = broken
    else:
        rows[1, 17] = broken
    first, failed, last = sample(rows, [state(**options) for _ in rows])
    assert (first, last) == (alone[0], alone[2])
    assert isinstance(failed, ComputeError)
    assert "not numbers" in str(failed)


def test_a_processor_that_fails_fails_its_row_alone() -> None:
    class Broken(Only):
        def mask(self, logits: NDArray[np.float32]) -> None:
            raise InputError("too complex")

    rows = np.stack([logits_of(seed) for seed in range(2)])
    failed, fine = sample(rows.copy(), [state(grammar=Broken()), state()])
    assert isinstance(failed, InputError)
    assert fine == Sampled(int(rows[1].argmax()))


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    [failed] = sample(logits_of(4)[None], [state(grammar=Only(), temperature=0.7)])
    assert isinstance(failed, ComputeError)
    assert "no token is left" in str(failed)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"min_p": -0.1}, "min_p is -0.1; expected a number of at least 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a'; expected a token id"),
        ({"logit_bias": {-1: 1}}, "logit_bias has the key -1"),
        ({"logit_bias": {1: 101}}, "logit_bias has 101 for token 1; expected a number"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias has nan"),
        ({"logit_bias": {1: True}}, "logit_bias has True"),
        ({"grammar": "json"}, "grammar is 'json'; expected a Grammar"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        SamplingParams.from_options(options)


@pytest.mark.parametrize("options", [{"stop_token_ids": (3, 500)}, {"logit_bias": {500: 1.0}}])
def test_token_ids_beyond_the_vocabulary_are_named(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    params.check_vocabulary(501)
    with pytest.raises(InputError, match=f"{next(iter(options))} has token id 500; the vocabulary"):
        params.check_vocabulary(500)


def test_an_unknown_stop_token_is_refused_before_it_reaches_a_step(
    tiny_engine: Callable[[str], TinyEngine],
) -> None:
    with tiny_engine("llama").open() as engine:
        alone = engine.generate(text="Hello", max_tokens=4, ignore_eos=True)
        with pytest.raises(InputError, match="stop_token_ids has token id 99999"):
            engine.generate(text="Hello", max_tokens=4, min_tokens=2, stop_token_ids=(99999,))
        again = engine.generate(text="Hello", max_tokens=4, ignore_eos=True)
    assert again.token_ids == alone.token_ids
