"""Streaming text: whole characters, stop strings, special tokens."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glmcompile.runtime.detokenizer import Detokenizer, special_ids

TEXT = "Grüße 世界 🌍👩‍👩‍👧 tap(x)\n  ok"


def byte_level() -> Tokenizer:
    """One token per byte, so that every longer character is split over tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama-2's kind of decoder: a word's first space is stripped at the start, bytes fall back."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "c", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def fallback_ids(text: str) -> list[int]:
    """The ids of `sentence_piece` for text written in bytes."""
    return [1 + byte for byte in text.encode()]


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """The text shown after each token, and after the end."""
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def byte_ids(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(text).ids
    # ByteLevel writes each byte as one printable letter: invert through single-byte decoding.
    of_byte = {}
    for letter, id in tokenizer.get_vocab().items():
        if len(letter) == 1:
            of_byte[_letter_byte(letter)] = id
    return [of_byte[byte] for byte in text]


def _letter_byte(letter: str) -> int:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(letter)
    return code if code in printable else others[code - 256]


def test_characters_are_never_split() -> None:
    tokenizer = byte_level()
    pieces = run(Detokenizer(tokenizer), tokenizer.encode(TEXT).ids)
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # The euro of three bytes shows with its third.
    assert run(Detokenizer(tokenizer), tokenizer.encode("€").ids) == ["", "", "€", ""]


@given(st.lists(st.integers(0, 256), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_end_as_the_whole_decoding(ids: list[int]) -> None:
    tokenizer = byte_level()
    pieces = run(Detokenizer(tokenizer, special_ids(tokenizer)), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from([[i] for i in range(257, 262)]) | st.text().map(fallback_ids)))
@settings(max_examples=300, deadline=None)
def test_sentence_piece_spaces_and_bytes_end_as_the_whole_decoding(parts: list[list[int]]) -> None:
    tokenizer = sentence_piece()
    ids = [id for part in parts for id in part]
    detokenizer = Detokenizer(tokenizer)
    run(detokenizer, ids)
    assert detokenizer.text == tokenizer.decode(ids)


def test_invalid_bytes_are_not_held_back_for_ever() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    for token in byte_ids(tokenizer, b"\x80" * 200):
        detokenizer.add(token)
    assert len(detokenizer.text) > 150


def test_special_tokens_have_no_text() -> None:
    tokenizer = byte_level()
    special = special_ids(tokenizer)
    assert special == {tokenizer.token_to_id("<|end|>")}
    ids = tokenizer.encode("a<|end|>é<|end|>").ids
    assert "".join(run(Detokenizer(tokenizer, special), ids)) == "aé"


def test_a_special_token_that_is_not_to_be_skipped_is_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["</think>"])
    special = special_ids(tokenizer) - {tokenizer.token_to_id("</think>")}
    ids = tokenizer.encode("é</think>a<|end|>").ids
    assert "".join(run(Detokenizer(tokenizer, special), ids)) == "é</think>a"


@pytest.mark.parametrize("stop", [["\nUser:"], ["er:", "zzz"], ["\nUser", "User:"], ["Ü"]])
def test_stop_strings_split_over_tokens_never_show(stop: list[str]) -> None:
    tokenizer = byte_level()
    text = "answer é\nUser: Ünot this"
    cut = min(place for item in stop if (place := text.find(item)) >= 0)
    detokenizer = Detokenizer(tokenizer, stop=stop)
    shown = ""
    for token in tokenizer.encode(text).ids:
        shown += detokenizer.add(token)
        assert text[:cut].startswith(shown)
    assert shown + detokenizer.finish() == text[:cut] == detokenizer.text
    assert detokenizer.stopped_by in stop


def test_the_beginning_of_a_stop_string_shows_when_it_comes_to_nothing() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, stop=["aab"])
    pieces = run(detokenizer, tokenizer.encode("xaaac").ids)
    assert pieces == ["x", "", "", "a", "aac", ""][: len(pieces)]
    assert detokenizer.text == "xaaac"
    assert detokenizer.stopped_by is None


def test_what_is_held_back_shows_at_the_end() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, stop=["abc"])
    assert run(detokenizer, tokenizer.encode("zab").ids) == ["z", "", "", "ab"]
    unfinished = byte_ids(tokenizer, "é".encode()[:1])
    assert run(Detokenizer(tokenizer), unfinished) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_stop_string_may_complete_at_the_very_end() -> None:
    # The last character is unfinished when generation ends; it is part of the stop string.
    tokenizer = byte_level()
    stop = "a\N{REPLACEMENT CHARACTER}"
    detokenizer = Detokenizer(tokenizer, stop=[stop])
    assert "".join(run(detokenizer, byte_ids(tokenizer, b"za\xc3"))) == "z"
    assert detokenizer.stopped_by == stop


def test_merged_tokens_end_as_the_whole_decoding() -> None:
    corpus = ["Öffne die Einstellungen 世界 🌍🌎🌏", 'do(action="Tap", element=[512, 300])'] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, show_progress=False
        ),
    )
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(60)]
        assert "".join(run(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)
