"""Tool calls: read from what models write, streamed in any pieces, and asked for as a grammar."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.runtime.grammar_compiler import GrammarCompiler
from glmcompile.runtime.sampler import SamplingState, sample
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.tool_formats import ToolCall, ToolFormat, tool_format
from glmcompile.serve.tools import ToolParser, tool_grammar
from tests.serve.pieces import assembled, cut

REFERENCE = Path(__file__).parents[2] / "calibration" / "reference"
ENDS = (752, 759, 761)

TEMPLATES = {
    "hermes": (
        "For each function call, return a json object within <tool_call></tool_call> XML tags:\\n"
        '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n'
    ),
    "glm": (
        "<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key>\\n<arg_value>{arg-value-1}"
        "</arg_value>\\n</tool_call> ... tc.arguments"
    ),
    "llama": (
        'Respond in the format {\\"name\\": function name, \\"parameters\\": dictionary of '
        "argument name and its value}. Do not use variables."
    ),
}
FORMATS: dict[str, ToolFormat] = {
    name: format for name, text in TEMPLATES.items() if (format := tool_format(text)) is not None
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tap",
            "description": "Taps the screen.",
            "parameters": {
                "type": "object",
                "properties": {
                    "at": {"$ref": "#/$defs/point"},
                    "label": {"type": "string", "maxLength": 8},
                    "button": {"type": "string", "enum": ["left", 'say "<sop>"']},
                    "long": {"type": "boolean"},
                },
                "required": ["at", "button"],
                "additionalProperties": False,
                "$defs": {
                    "point": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 999},
                        "minItems": 2,
                        "maxItems": 2,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "go_back"}},
]
SCHEMAS = {
    "tap": TOOLS[0]["function"]["parameters"],  # type: ignore[index]
    "go_back": {"type": "object", "maxProperties": 0},
}


def parse(format: ToolFormat, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolParser(format, TOOLS)
    deltas = [parser.add(piece) for piece in pieces] + [parser.finish()]
    return "".join(delta[0] for delta in deltas), [call for delta in deltas for call in delta[1]]


def written(name: str, call: ToolCall) -> str:
    """A call as the template of a format writes it."""
    arguments = json.loads(call.arguments)
    if name == "hermes":
        return (
            f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': arguments})}\n</tool_call>"
        )
    if name == "llama":
        return json.dumps({"name": call.name, "parameters": arguments})
    lines = [f"<tool_call>{call.name}"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
    return "\n".join([*lines, "</tool_call>"])


def test_the_format_is_told_by_the_template() -> None:
    assert set(FORMATS) == set(TEMPLATES)
    assert len({format.signs for format in FORMATS.values()}) == 3
    assert tool_format("{{ message.content }}") is None
    assert tool_format("<tool_call>\n<function=name>\n<parameter=key> arguments") is None


CALLS = st.builds(
    lambda at, label, long: ToolCall(
        "tap", json.dumps({"at": at, "label": label, "button": "left", "long": long})
    ),
    st.lists(st.integers(0, 999), min_size=2, max_size=2),
    st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=20),
    st.booleans(),
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(call=CALLS)
def test_calls_are_read_as_the_template_writes_them(name: str, call: ToolCall) -> None:
    content, calls = parse(FORMATS[name], [written(name, call)])
    assert (content, len(calls)) == ("", 1)
    assert calls[0].name == "tap"
    assert json.loads(calls[0].arguments) == json.loads(call.arguments)


@pytest.mark.parametrize("name", ["hermes", "glm"])
def test_content_and_several_calls(name: str) -> None:
    first = ToolCall("tap", '{"at": [1, 2], "label": "12", "button": "left"}')
    back = ToolCall("go_back", "{}")
    text = f"I will.\n\n{written(name, first)}\n{written(name, back)}\n Then.\n"
    assert parse(FORMATS[name], [text]) == ("I will.Then.\n", [first, back])
    assert parse(FORMATS[name], list(text)) == ("I will.Then.\n", [first, back])
    assert first.id != back.id


def test_what_a_format_allows_besides() -> None:
    back, tap = ToolCall("go_back", "{}"), ToolCall("tap", '{"at": [1, 2]}')
    hermes, glm, llama = (FORMATS[name] for name in ("hermes", "glm", "llama"))
    # A last call without its end marker, as where an end token comes in its place.
    assert parse(hermes, ['<tool_call>\n{"name": "go_back"}\n']) == ("", [back])
    assert parse(glm, ["<tool_call>go_back\n"]) == ("", [back])
    # Arguments as a string of JSON, an end marker inside of a string.
    text = '<tool_call>{"name": "tap", "arguments": "{\\"at\\": [1, 2]}"}</tool_call>'
    assert parse(hermes, [text]) == ("", [tap])
    inside = ToolCall("tap", '{"label": "</tool_call>"}')
    assert parse(hermes, [written("hermes", inside), "!"]) == ("!", [inside])
    # Llama's marker, and several calls.
    text = '<|python_tag|>{"name": "tap", "parameters": {"at": [1, 2]}}; {"name": "go_back"}'
    assert parse(llama, list(text)) == ("", [tap, back])
    # Without a line break between, as GLM-4.7 writes; types that the tool does not tell.
    text = "<tool_call>other<arg_key>a</arg_key><arg_value>[1]</arg_value></tool_call>"
    assert parse(glm, [text]) == ("", [ToolCall("other", '{"a": [1]}')])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "tap", "arguments": {"at": [1,}}\n</tool_call> and on'),
        ("hermes", ' a <tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "tap", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "tap", "arguments": {"at": NaN}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>{"name": "tap", "argum'),
        ("hermes", "a < b <tool"),
        ("hermes", " \n"),
        ("glm", "<tool_call>tap\n<arg_key>at</arg_key>\n</tool_call>"),
        ("glm", "<tool_call><arg_key>a</arg_key></tool_call>"),
        ("glm", "<tool_call>tap\n<arg_key>at</arg_key>\n<arg_value>[1"),
        ("llama", '{"name": "tap", "parameters": {"at": '),
        ("llama", '{"answer": 42}'),
        ("llama", 'Sure: {"name": "go_back"}'),
        ("llama", '{"name": "go_back"} is what I would call'),
        ("llama", "  "),
    ],
)
def test_what_is_no_call_is_content_to_the_last_character(name: str, text: str) -> None:
    assert parse(FORMATS[name], [text]) == (text, [])
    pieces = [text[i : i + 7] for i in range(0, min(len(text), 2000), 7)] + [text[2000:]]
    assert parse(FORMATS[name], pieces) == (text, []) or len(text) > 2000


PARTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "go_back", "arguments": {}}',
    '{"name": "tap", "parameters": {"label": "<tool_call></tool_call>"}}',
    "go_back",
    "<arg_key>at</arg_key>",
    "<arg_value>[1, 2]</arg_value>",
    "<|python_tag|>",
    "<tool",
    '{"name": "',
    "</",
    "; ",
    "\n",
    "x",
]


@pytest.mark.parametrize("name", TEMPLATES)
@given(cut_text=cut(assembled(PARTS)))
def test_any_pieces_give_what_the_whole_gives(name: str, cut_text: tuple[str, list[str]]) -> None:
    text, pieces = cut_text
    assert parse(FORMATS[name], pieces) == parse(FORMATS[name], [text])


def test_content_is_given_out_until_a_call_may_begin_and_a_call_when_it_is_complete() -> None:
    parser = ToolParser(FORMATS["hermes"], TOOLS)
    assert parser.add("I will \n") == ("I will", [])
    assert parser.add("<tool_") == ("", [])
    assert parser.add('call>{"name": "go_back"}') == ("", [])
    assert parser.add("</tool_call>") == ("", [ToolCall("go_back", "{}")])
    assert parser.add("\n") == ("", [])
    parser = ToolParser(FORMATS["llama"], TOOLS)
    assert parser.add(" Not") == (" Not", [])
    assert parser.add('{"name": "go_back"}') == ('{"name": "go_back"}', [])


def tokenizer_with(special: bool | None) -> Tokenizer:
    """The reference's; the markers are text (None), added tokens, or special tokens."""
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    markers = [] if special is None else ["<|python_tag|>", *FORMATS["glm"].markers]
    tokenizer.add_tokens([AddedToken(marker, special=bool(special)) for marker in markers])
    return tokenizer


def answers(tokenizer: Tokenizer, grammar: Grammar, count: int, vocab_size: int = 800) -> list[str]:
    """Of random logits under the grammar, end tokens and markers likelier than others."""
    compile = GrammarCompiler(tokenizer, vocab_size, ENDS)
    likely = [*ENDS, *range(768, vocab_size), *tokenizer.encode("</").ids]
    texts = []
    for seed in range(count):
        params = SamplingParams(
            temperature=1.0, seed=seed, grammar=grammar, logit_bias=dict.fromkeys(likely, 6.0)
        )
        state = SamplingState(params, (), ENDS, compile(grammar))
        random = np.random.default_rng(seed)
        tokens: list[int] = []
        while not state.finished and not set(tokens[-1:]) & set(ENDS) and len(tokens) < 2000:
            following = state.forced()
            if not following:
                logits = random.normal(0, 2, (1, vocab_size)).astype(np.float32)
                [sampled] = sample(logits, [state])
                assert not isinstance(sampled, Exception), sampled
                following = [sampled.token]
            for token in following:
                state.accept(token)
            tokens += following
        if len(tokens) < 2000:
            ids = [token for token in tokens if token not in ENDS]
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
    return texts


@pytest.mark.parametrize("special", [None, False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_required_call_is_valid_whatever_the_model(name: str, special: bool | None) -> None:
    grammar = tool_grammar(FORMATS[name], TOOLS, "required")
    assert grammar is not None
    texts = answers(tokenizer_with(special), grammar, 12)
    assert len(texts) >= (3 if name == "glm" and special is None else 10)
    seen = set()
    for text in texts:
        content, calls = parse(FORMATS[name], [text])
        assert content == ""
        assert calls, text
        for call in calls:
            seen.add(call.name)
            arguments = json.loads(call.arguments)
            arguments.pop("label", None) if name == "glm" else None  # strings are free there
            jsonschema.validate(arguments, SCHEMAS[call.name])
    assert seen == {"tap", "go_back"}


def test_a_named_function_is_called_once_after_thinking() -> None:
    choice = {"type": "function", "function": {"name": "tap"}}
    grammar = tool_grammar(FORMATS["hermes"], TOOLS, choice)
    assert grammar is not None
    grammar = replace(grammar, after="</think>", opened_by="<think>")
    tokenizer = tokenizer_with(special=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    for text in answers(tokenizer, grammar, 6):
        thinking, _, rest = text.rpartition("</think>")
        assert thinking == "" or thinking.startswith("<think>")
        content, calls = parse(FORMATS["hermes"], [rest])
        assert (content, [call.name for call in calls]) == ("", ["tap"])


def test_parallel_calls_can_be_ruled_out() -> None:
    grammar = tool_grammar(FORMATS["hermes"], TOOLS, "required", parallel=False)
    assert grammar is not None
    for text in answers(tokenizer_with(None), grammar, 8):
        assert len(parse(FORMATS["hermes"], [text])[1]) == 1


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_other_choices_ask_for_nothing(choice: str | None) -> None:
    assert tool_grammar(FORMATS["hermes"], TOOLS, choice) is None
    assert tool_grammar(None, TOOLS, choice) is None


@pytest.mark.parametrize(
    ("format", "tools", "choice", "complaint"),
    [
        ("hermes", TOOLS, "any", "tool_choice is 'any'; expected none, auto, required"),
        (
            "hermes",
            TOOLS,
            {"type": "function", "function": {"name": "x"}},
            "tools has tap, go_back",
        ),
        ("hermes", TOOLS, {"type": "function"}, "tool_choice names None"),
        ("hermes", [], "required", "there are no tools"),
        (None, TOOLS, "required", "describes no known tool format"),
        ("hermes", ["tap"], "auto", r"tools\[0\]: expected a function with a name"),
        ("hermes", [{"function": {"name": ""}}], "auto", r"tools\[0\]: expected a function"),
        ("glm", [{"name": "a", "parameters": 3}], "auto", "expected `parameters` to be a JSON"),
        (
            "hermes",
            [{"name": "a", "parameters": {"multipleOf": 10**9}}],
            "required",
            "multipleOf is 1000000000",
        ),
    ],
)
def test_choices_that_cannot_be_met_are_named(
    format: str | None, tools: list[Any], choice: Any, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        tool_grammar(FORMATS[format] if format else None, tools, choice)
