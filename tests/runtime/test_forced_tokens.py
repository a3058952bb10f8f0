"""Tokens that a grammar forces are appended without a decoder call of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from glmcompile.runtime.engine import Engine
from glmcompile.runtime.grammar import Grammar
from tests.engines import TinyEngine

TAP = r'do\(action="Tap", element=\[[0-9]{1,3},[0-9]{1,3}\]\)'


@pytest.fixture(scope="module")
def engine(tiny_engine: Callable[[str], TinyEngine]) -> Iterator[Engine]:
    with tiny_engine("llama").open() as opened:
        yield opened


def test_forced_tokens_take_no_steps_and_are_in_the_answer(engine: Engine) -> None:
    before = engine.stats().steps
    done = engine.generate(prompt="Tap it.", grammar=Grammar.regex(TAP), max_tokens=100)
    steps = engine.stats().steps - before
    assert done.text.startswith('do(action="Tap", element=[')
    assert done.text.endswith("])")
    assert done.finish_reason == "stop"
    assert engine.prompts.tokenizer.decode(list(done.token_ids)) == done.text
    # Two numbers of up to three digits are chosen, what separates them, and the end.
    assert steps <= 12
    assert len(done.token_ids) > 2 * steps


def test_the_decoder_sees_forced_tokens_as_if_it_had_chosen_them(engine: Engine) -> None:
    grammar = Grammar.regex(r"abc[d-z]{12}")
    done = engine.generate(prompt="x", grammar=grammar, max_tokens=40)
    # With log-probabilities no token is forced: every one is computed and chosen.
    chosen = engine.generate(prompt="x", grammar=grammar, max_tokens=40, logprobs=0)
    assert done.text == chosen.text
    assert done.token_ids == chosen.token_ids
    assert len(chosen.logprobs) == len(chosen.token_ids)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_forced_tokens_count_towards_the_limit(engine: Engine, max_tokens: int) -> None:
    done = engine.generate(prompt="x", grammar=Grammar.regex(TAP), max_tokens=max_tokens)
    assert len(done.token_ids) == max_tokens
    assert done.finish_reason == "length"
    assert done.text == 'do(action="Tap", element=[0,0])'[:max_tokens] or max_tokens == 30
    assert len(done.timings.inter_token) == max_tokens - 1


def test_an_answer_that_is_forced_as_a_whole_ends_by_itself(engine: Engine) -> None:
    done = engine.generate(prompt="x", grammar=Grammar.choice(["only this"]), max_tokens=60)
    assert (done.text, done.finish_reason) == ("only this", "stop")
    with engine.stream(prompt="x", grammar=Grammar.choice(["only this"]), max_tokens=60) as stream:
        assert "".join(stream) == "only this"


def test_stop_strings_end_forced_text_too(engine: Engine) -> None:
    done = engine.generate(prompt="x", grammar=Grammar.regex(TAP), stop=["element"], max_tokens=99)
    assert done.text == 'do(action="Tap", '
    assert done.stop_reason == "element"
    engine.check_integrity()
