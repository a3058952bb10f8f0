"""Prompts equal transformers' apply_chat_template and processors: text and token ids."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from glmcompile.errors import ArtifactError, InputError
from glmcompile.runtime.image_processor import image_processor
from glmcompile.runtime.prompt import PromptBuilder
from tests.runtime import reference
from tests.runtime.conftest import TinyModel
from tests.runtime.images import noise

TinyModels = Callable[[str], TinyModel]

TEXT_CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be <b>brief</b> & kind."},
        {"role": "user", "content": "Grüße, 世界 🌍!"},
        {"role": "assistant", "content": "Hallo.", "tool_calls": None},
        {"role": "user", "content": "  spaces\n\nand lines "},
    ],
]

TEMPLATES = {
    "filters": "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.content | trim }}\n"
    "{% endfor %}{{ eos_token }}{{ tools | tojson(indent=2) }}",
    "blocks": "  {% for m in messages %}\n    {% if m.role == 'system' %}\n{% continue %}\n"
    "    {% endif %}\n{{ m.role }}: {{ m.content }}\n  {% endfor %}\ntail",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ strftime_now('%Y') }}{{ documents is none }}",
    "reasoning": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{{ m.reasoning_content or 'none' }}{% endfor %}"
    "{{ add_generation_prompt }}{{ flag }}",
}


def builder(model: TinyModel) -> PromptBuilder:
    return PromptBuilder(model.directory, model.placeholder)


def with_template(model: TinyModel, template: str, directory: Path) -> PromptBuilder:
    copy = directory / "model"
    shutil.copytree(model.directory, copy)
    (copy / "chat_template.jinja").write_text(template)
    return PromptBuilder(copy, model.placeholder)


@pytest.mark.parametrize("chat", TEXT_CHATS)
def test_text_chats_equal_transformers(
    tiny_model: TinyModels, family_name: str, chat: list[dict[str, Any]]
) -> None:
    model = tiny_model(family_name)
    prompts = builder(model)
    messages, images = prompts.split_images(chat)
    prompt = prompts.chat(messages)
    theirs = reference.processor(model.directory, model.name)
    assert images == []
    assert prompt.text == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    expected = theirs.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    expected = expected[0] if isinstance(expected[0], list) else expected
    assert prompts.encode(prompt) == expected


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl"])
@pytest.mark.parametrize("sizes", [[(84, 56)], [(150, 90), (30, 200), (28, 28)]])
def test_image_chats_equal_transformers(
    tiny_model: TinyModels, family: str, sizes: list[tuple[int, int]]
) -> None:
    model = tiny_model(family)
    prompts = builder(model)
    shown = [noise(*size, seed) for seed, size in enumerate(sizes)]
    content = [{"type": "image", "image": image} for image in shown]
    chat = [
        {"role": "user", "content": [*content, {"type": "text", "text": "Öffne die Settings"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}, content[0]]},
    ]
    messages, images = prompts.split_images(chat)
    prompt = prompts.chat(messages)
    theirs = reference.processor(model.directory, model.name)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.text == expected
    process = image_processor(model.vision, model.directory)
    tokens = [process(image).token_ids for image in images]
    expected = theirs.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert prompts.encode(prompt, tokens) == expected["input_ids"][0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_features_equal_transformers(
    tiny_model: TinyModels, tmp_path: Path, name: str
) -> None:
    model = tiny_model("llama")
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " <ü> ", "thinking": "h"},
    ]
    tools = [{"type": "function", "function": {"name": "tap", "parameters": {"x": [1, 2.5, None]}}}]
    ours = with_template(model, TEMPLATES[name], tmp_path).render(
        chat, tools=tools, options={"flag": "é"}
    )
    expected = reference.tokenizer(model.directory).apply_chat_template(
        chat,
        tools=tools,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=True,
        flag="é",
    )
    assert ours == expected


def test_openai_parts_and_bare_parts_find_their_images(tiny_model: TinyModels) -> None:
    prompts = builder(tiny_model("glm4v"))
    encoded = BytesIO()
    noise(30, 30).save(encoded, "PNG")
    payload = base64.b64encode(encoded.getvalue()).decode()
    url = f"data:image/png;base64,{payload}"
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image"},
        {"type": "image_url", "image_url": "b.png"},
        {"type": "image", "base64": payload},
    ]
    messages, images = prompts.split_images([{"role": "user", "content": parts}], ["a.png"])
    assert [image.source for image in images[:3]] == [url, "a.png", "b.png"]
    assert images[3].source.endswith(payload)
    places = [f"messages[0].content[{i}]" for i in range(4)]
    assert [image.where for image in images] == [places[0], "images[0]", *places[2:]]
    assert prompts.render(messages).count("<|image|>") == 4


def test_text_models_take_text_parts_as_one_string(tiny_model: TinyModels) -> None:
    prompts = builder(tiny_model("llama"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages, _ = prompts.split_images([{"role": "user", "content": parts}])
    assert messages == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize(
    ("messages", "images", "complaint"),
    [
        ([], [], "messages is empty"),
        (["hi"], [], r"messages\[0\]: expected a mapping"),
        ([{"role": "user", "content": 3}], [], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "'video' is not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], "`text` to be a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "without an image"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], "image_url to be a URL"),
        ([{"role": "user", "content": "hi"}], ["a.png"], "1 of 1 images have no place"),
    ],
)
def test_malformed_messages_are_named(
    tiny_model: TinyModels, messages: Any, images: list[Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        builder(tiny_model("glm4v")).split_images(messages, images)


def test_images_are_refused_by_text_models(tiny_model: TinyModels) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    with pytest.raises(InputError, match="this model takes text only"):
        builder(tiny_model("llama")).split_images(chat)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages.missing.role }}"]
)
def test_a_template_that_rejects_messages_is_an_input_error(
    tiny_model: TinyModels, tmp_path: Path, template: str
) -> None:
    prompts = with_template(tiny_model("llama"), template, tmp_path)
    with pytest.raises(InputError, match="the chat template rejects the messages"):
        prompts.render([{"role": "user", "content": "x"}])


def test_templates_cannot_reach_python(tiny_model: TinyModels, tmp_path: Path) -> None:
    prompts = with_template(
        tiny_model("llama"), "{{ messages.__class__.__mro__[1].__subclasses__() }}", tmp_path
    )
    with pytest.raises(InputError, match="unsafe"):
        prompts.render([{"role": "user", "content": "x"}])


def test_damaged_files_are_artifact_errors(tiny_model: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not valid Jinja"):
        with_template(tiny_model("llama"), "{% if %}", tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: not UTF-8"):
        PromptBuilder(tmp_path / "model", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: not a tokenizer's settings"):
        PromptBuilder(tmp_path / "model", None)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        PromptBuilder(tmp_path / "model", None)


def test_without_a_template_chats_are_refused_and_text_still_works(
    tiny_model: TinyModels, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    shutil.copytree(model.directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    prompts = PromptBuilder(tmp_path / "model", None)
    assert not prompts.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        prompts.render([{"role": "user", "content": "x"}])
    assert (
        prompts.encode(prompts.whole("x")) == reference.tokenizer(model.directory)("x")["input_ids"]
    )


def test_templates_in_the_tokenizer_config_are_read(tiny_model: TinyModels, tmp_path: Path) -> None:
    model = tiny_model("llama")
    shutil.copytree(model.directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for stored in ("T", [{"name": "other", "template": "O"}, {"name": "default", "template": "T"}]):
        file.write_text(json.dumps(settings | {"chat_template": stored}))
        prompts = PromptBuilder(tmp_path / "model", None)
        assert prompts.render([{"role": "user", "content": "x"}]) == "T"
