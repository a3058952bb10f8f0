"""Control tokens in strangers' words arrive as text; the template's and the model's own stay."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from glmcompile.runtime.control_tokens import ControlTokens
from glmcompile.runtime.prompt import PromptBuilder
from tests.checkpoints import SPECIAL_TOKENS
from tests.runtime import reference
from tests.runtime.conftest import TinyModel

TinyModels = Callable[[str], TinyModel]

IMAGE = {"glm4v": "<|image|>", "qwen2_vl": "<|image_pad|>"}


def builder(model: TinyModel) -> PromptBuilder:
    return PromptBuilder(model.directory, model.placeholder)


def copied(model: TinyModel, directory: Path, template: str) -> PromptBuilder:
    shutil.copytree(model.directory, directory / "model")
    (directory / "model" / "chat_template.jinja").write_text(template)
    return PromptBuilder(directory / "model", model.placeholder)


def chat_ids(prompts: PromptBuilder, chat: list[dict[str, Any]], **arguments: Any) -> list[int]:
    messages, images = prompts.split_images(chat)
    shown = [features(prompts, 2)] * len(images)
    return prompts.encode(prompts.chat(messages, **arguments), shown)


def features(prompts: PromptBuilder, count: int) -> list[int]:
    """The tokens of an image of `count` features; none of a text model."""
    known = [prompts.tokenizer.token_to_id(mark) for mark in IMAGE.values()]
    return [id for id in known if id is not None] * count


def num_special(prompts: PromptBuilder, ids: list[int]) -> int:
    special = prompts.tokenizer.get_added_tokens_decoder()
    return sum(id in special for id in ids)


def decoded(prompts: PromptBuilder, ids: list[int]) -> str:
    return prompts.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("role", ["user", "system", "tool", "developer"])
def test_no_token_can_be_typed(tiny_model: TinyModels, family_name: str, role: str) -> None:
    prompts = builder(tiny_model(family_name))
    for token in SPECIAL_TOKENS[family_name]:
        text = f"before {token}after"
        chat = [{"role": role, "content": text}, {"role": "user", "content": token}]
        plain = [{"role": role, "content": "hi"}, {"role": "user", "content": "hi"}]
        ids = chat_ids(prompts, chat)
        assert num_special(prompts, ids) == num_special(prompts, chat_ids(prompts, plain))
        assert decoded(prompts, ids) == prompts.render(chat)


PRINTS_ALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.name }}{{ m.content }}"
    "{{ m | tojson }}<|im_end|>{% endfor %}{{ tools | tojson }}{{ note }}"
)


def test_names_tools_and_options_hold_no_tokens(tiny_model: TinyModels, tmp_path: Path) -> None:
    prompts = copied(tiny_model("llama"), tmp_path, PRINTS_ALL)
    bad = "<|im_end|>"
    chat = [{"role": "tool", "content": "x", "name": bad, bad: [{"type": bad}, {bad: bad}]}]
    tools = [{"type": "function", "function": {"name": bad, bad: bad, "enum": [bad]}}]
    ids = chat_ids(prompts, chat, tools=tools, options={"note": bad})
    assert num_special(prompts, ids) == 2
    assert decoded(prompts, ids).count(bad) == 12


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (None, [{"role": "user", "content": ["<|im_", "end|>"]}]),
        (None, [{"role": "user", "content": ["<|im_start|", ">"]}]),
        ("<|im_start|>{{ messages[0].content | replace('--', '') }}<|im_end|>", "<|im--_end|>"),
        ("<|im_start|>{{ messages[0].content | trim ~ 'end|>' }}<|im_end|>", "<|im_ "),
        ("<|im_start|><{{ messages[0].content }}>{{ '<|im_end|>' }}", "|im_end|"),
    ],
)
def test_tokens_cannot_be_put_together(
    tiny_model: TinyModels, tmp_path: Path, template: str | None, chat: Any
) -> None:
    model = tiny_model("qwen2_vl")
    if template is None:
        prompts, template_tokens = builder(model), 3
        chat[0]["content"] = [{"type": "text", "text": text} for text in chat[0]["content"]]
    else:
        prompts, template_tokens = copied(model, tmp_path, template), 2
        chat = [{"role": "user", "content": chat}]
    ids = chat_ids(prompts, chat)
    assert num_special(prompts, ids) == template_tokens
    assert decoded(prompts, ids).count("<|im_") == template_tokens + 1


@pytest.mark.parametrize("family", IMAGE)
def test_a_typed_placeholder_is_no_image(tiny_model: TinyModels, family: str) -> None:
    model = tiny_model(family)
    prompts = builder(model)
    mark = IMAGE[family]
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": mark}, {"type": "image", "url": "a"}],
        },
        {"role": "assistant", "content": f"I saw {mark}."},
        {"role": "user", "content": mark},
    ]
    messages, _ = prompts.split_images(chat)
    ids = prompts.encode(prompts.chat(messages), [features(prompts, 3)])
    assert ids.count(model.contract.image_token_id) == 3
    assert decoded(prompts, ids).count(mark) == 3 + 3


def test_the_models_own_tokens_stay_tokens(tiny_model: TinyModels, family_name: str) -> None:
    model = tiny_model(family_name)
    prompts = builder(model)
    ending = SPECIAL_TOKENS[family_name][0]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"one{ending}two"},
        {"role": "user", "content": "go on"},
    ]
    theirs = reference.processor(model.directory, family_name).apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    theirs = theirs[0] if isinstance(theirs[0], list) else theirs
    assert chat_ids(prompts, chat) == theirs


def test_whole_prompts_are_their_callers_own(tiny_model: TinyModels, family_name: str) -> None:
    model = tiny_model(family_name)
    prompts = builder(model)
    text = "a" + "b".join(t for t in SPECIAL_TOKENS[family_name] if t != IMAGE.get(family_name))
    expected = reference.tokenizer(model.directory)(text)["input_ids"]
    assert prompts.encode(prompts.whole(text)) == expected


def test_added_tokens_that_are_not_special_are_encoded_as_ever(
    tiny_model: TinyModels, tmp_path: Path
) -> None:
    model = tiny_model("glm4v")
    directory = tmp_path / "model"
    shutil.copytree(model.directory, directory)
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(file))
    prompts = PromptBuilder(directory, model.placeholder)
    chat = [{"role": "system", "content": "Write <think>why</think>, then do(...)."}]
    expected = reference.tokenizer(directory).apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert chat_ids(prompts, chat) == expected
    think = tokenizer.token_to_id("<think>")
    assert think in expected
    chat[0]["content"] += "<|user|>"
    ids = chat_ids(prompts, chat)
    assert ids.count(think) == 1
    assert tokenizer.token_to_id("<|user|>") not in ids


def test_without_a_template_a_users_turn_is_text_too(
    tiny_model: TinyModels, tmp_path: Path
) -> None:
    model = tiny_model("glm4v")
    prompts = copied(model, tmp_path, "")
    assert not prompts.has_chat_template
    ids = prompts.encode(prompts.turn("<|image|><|user|>", 1), [features(prompts, 4)])
    assert ids.count(model.contract.image_token_id) == 4
    assert num_special(prompts, ids) == 4
    assert decoded(prompts, ids) == "<|image|>" * 5 + "<|user|>"


FRAGMENTS = sorted(
    {token for tokens in SPECIAL_TOKENS.values() for token in tokens}
    | {"<", "<|", "|", "|>", ">", "[", "]", "<|im", "_end|>", "<|us", "er|>", "sop", " ", "\n"}
)
TEXT = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    ),
    max_size=6,
).map("".join)
PARTS = st.lists(
    st.one_of(
        TEXT.map(lambda text: {"type": "text", "text": text}),
        st.just({"type": "image", "url": "a.png"}),
    ),
    max_size=4,
)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    roles = st.sampled_from(["system", "user", "user", "tool", "assistant"])
    chat = []
    for role in draw(st.lists(roles, min_size=1, max_size=5)):
        content: Any = st.just("plain words") if role == "assistant" else TEXT
        chat.append({"role": role, "content": draw(content if role != "user" else PARTS | TEXT)})
    return chat


def innocuous(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def calm(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": "x"} if part["type"] == "text" else part

    return [
        {**m, "content": "x" if isinstance(m["content"], str) else [calm(p) for p in m["content"]]}
        for m in chat
    ]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chat=chats())
def test_any_text_comes_back_and_adds_no_token(
    tiny_model: TinyModels, family_name: str, chat: list[dict[str, Any]]
) -> None:
    if family_name == "llama":
        for message in chat:
            if isinstance(message["content"], list):
                kept = [part for part in message["content"] if part["type"] == "text"]
                message["content"] = kept
    prompts = builders(tiny_model(family_name))
    ids = chat_ids(prompts, chat)
    expected = chat_ids(prompts, innocuous(chat))
    assert num_special(prompts, ids) == num_special(prompts, expected)
    model = tiny_model(family_name)
    mark = model.placeholder
    messages, _ = prompts.split_images(chat)
    prompt = prompts.chat(messages)
    written = prompt.text
    for start, stop in reversed(prompt.controls):
        if written[start:stop] == mark:
            written = written[:stop] + mark + written[stop:]  # two tokens an image
    assert decoded(prompts, ids) == written
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
        texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
        if message["role"] in ("user", "system"):
            assert all(text in written for text in texts)


_BUILDERS: dict[str, PromptBuilder] = {}


def builders(model: TinyModel) -> PromptBuilder:
    return _BUILDERS.setdefault(model.name, builder(model))


def metaspace_unigram() -> Tokenizer:
    """In the manner of SentencePiece: special tokens in the vocabulary, a prefix space."""
    letters = "abcdefghijklmnopqrstuvwxyz<>/|▁"
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def stripping_bpe() -> Tokenizer:
    """Special tokens that take the spaces around them, and one that is found after lower-casing."""
    vocabulary = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz<>/|_ ")}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(
        [
            AddedToken("<s>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("</s>", normalized=True),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("make", [metaspace_unigram, stripping_bpe])
def test_ids_of_meant_tokens_are_the_tokenizers_own(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    controls = ControlTokens(tokenizer, None)
    own = controls.read("<s> hello </s>there")
    expected = tokenizer.encode(own.text).ids
    assert controls.encode(own, (), add_special_tokens=True) == expected
    mixed = controls.read("<s> hello </s>" + controls.as_text("<s>there</s>"))
    ids = controls.encode(mixed, (), add_special_tokens=True)
    special = {tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")}
    added = sum(tokenizer.encode("a").special_tokens_mask)
    assert sum(id in special for id in ids) == 2 + added
    letters = [tokenizer.id_to_token(id) for id in ids[-12:]]
    assert "".join(letters) == "<s>there</s>"
    assert ids[: len(expected) - 5] == expected[:-5]


def test_text_that_becomes_a_token_by_normalizing_is_text() -> None:
    tokenizer = stripping_bpe()
    controls = ControlTokens(tokenizer, None)
    assert tokenizer.token_to_id("</s>") in tokenizer.encode("a</S>").ids
    ids = controls.encode(controls.read(controls.as_text("a</S>")), (), add_special_tokens=True)
    assert tokenizer.token_to_id("</s>") not in ids


def test_many_threads_get_one_threads_ids(tiny_model: TinyModels) -> None:
    prompts = builder(tiny_model("glm4v"))
    odd = [{"role": "user", "content": "<|user|>" * 20}]
    even = [{"role": "user", "content": "plain"}]
    alone = builder(tiny_model("glm4v"))
    expected = {True: chat_ids(alone, odd), False: chat_ids(alone, even)}
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(50):
            is_odd = bool((i + number) % 2)
            if chat_ids(prompts, odd if is_odd else even) != expected[is_odd]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_second_tokenizer_is_made_only_when_needed(
    tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = builder(tiny_model("glm4v"))
    made: list[str] = []
    original = tokenizers.Tokenizer.from_str

    class Counting:
        @staticmethod
        def from_str(text: str) -> Tokenizer:
            made.append(json.loads(text)["model"]["type"])
            return original(text)

    monkeypatch.setattr("glmcompile.runtime.control_tokens.Tokenizer", Counting)
    chat_ids(prompts, [{"role": "user", "content": "a < b | c > d <think>"}])
    assert made == []
    for _ in range(2):
        chat_ids(prompts, [{"role": "user", "content": "<|user|>"}])
    assert len(made) == 1
