"""Requests to token ids, spans and positions: equal to transformers, checked, and nothing else."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmcompile.errors import InputError
from glmcompile.rules.patches import PatchSettings
from glmcompile.runtime.input_processor import InputProcessor, PreparedPrompt, Prompt
from glmcompile.runtime.media import OWN, SERVED, InputPolicy
from tests.runtime import reference
from tests.runtime.conftest import TinyModel
from tests.runtime.images import noise

TinyModels = Callable[[str], TinyModel]

IMAGE_FAMILIES = ("glm4v", "qwen2_vl")


def processor(model: TinyModel) -> InputProcessor:
    return InputProcessor(model.directory, model.contract)


def data_url(width: int, height: int, seed: int = 0) -> str:
    encoded = BytesIO()
    noise(width, height, seed).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def agent_chat() -> list[dict[str, Any]]:
    """Images in several turns, of several sizes, in both forms, and an answer between them."""
    sizes = [(84, 56), (30, 200), (150, 90), (28, 28)]
    urls = [data_url(*size, seed) for seed, size in enumerate(sizes)]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [
        {"role": "system", "content": "Du tippst. <think>"},
        {"role": "user", "content": [shown[0], {"type": "text", "text": "Öffne"}, shown[1]]},
        {"role": "assistant", "content": "do(action='Tap', element=[1,2])"},
        {"role": "user", "content": [{"type": "text", "text": "now"}, shown[2]]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [shown[3], shown[0]]},
    ]


def in_their_form(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat as transformers wants it."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] == "text":
            return one
        return {"type": "image", "url": one["image_url"]["url"]}

    return [
        m if isinstance(m["content"], str) else {**m, "content": [part(p) for p in m["content"]]}
        for m in chat
    ]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("most", [None, 28 * 28 * 12, 10**12])
def test_agents_chats_equal_transformers(
    tiny_model: TinyModels, family: str, most: int | None
) -> None:
    model = tiny_model(family)
    own = PatchSettings.read(model.vision.processor.arguments)
    theirs = reference.processor(model.directory, family)
    bound = min(most or own.max_pixels, own.max_pixels)
    theirs.image_processor.size = {"shortest_edge": own.min_pixels, "longest_edge": bound}
    expected = theirs.apply_chat_template(
        in_their_form(agent_chat()), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    request = Prompt(messages=agent_chat(), mm_processor_kwargs={"max_pixels": most})
    ready = processor(model)(request, SERVED)
    assert ready.token_ids == expected["input_ids"][0]
    grids = [span.image.grid_thw for span in ready.images]
    assert np.array_equal(grids, expected["image_grid_thw"])
    pixels = np.concatenate([span.image.pixel_values for span in ready.images])
    assert pixels.tobytes() == np.asarray(expected["pixel_values"]).tobytes()
    for span in ready.images:
        tokens = ready.token_ids[span.start : span.end]
        assert set(tokens) == {model.contract.image_token_id}
    positions, offset = their_positions(model, expected)
    assert np.array_equal(ready.positions, positions)
    assert ready.position_offset == offset


def their_positions(model: TinyModel, inputs: Any) -> tuple[np.ndarray, int]:
    """Positions of a prompt's tokens, and what is added to later ones, by transformers' model."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.directory)
    name = config.architectures[0]
    with torch.device("meta"):
        whole = getattr(transformers, name)(config)
    ids = torch.tensor(inputs["input_ids"])
    arguments = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == model.contract.image_token_id).int(),
        "image_grid_thw": torch.tensor(np.asarray(inputs["image_grid_thw"])),
    }
    positions, delta = whole.model.get_rope_index(**arguments)
    return positions[:, 0].numpy(), int(delta)


def test_max_pixels_is_lowered_by_whoever_asks_for_less(tiny_model: TinyModels) -> None:
    inputs = processor(tiny_model("glm4v"))

    def pixels(policy: InputPolicy, most: int | None) -> int:
        options = None if most is None else {"max_pixels": most}
        prompt = Prompt(prompt="x", images=[noise(500, 400)], mm_processor_kwargs=options)
        return inputs(prompt, policy).images[0].image.pixels[..., 0].size

    whole, small, tiny = pixels(OWN, None), 2 * 28 * 28 * 10, 2 * 28 * 28 * 6
    bounded = replace(OWN, max_pixels=small)
    assert pixels(OWN, 10**9) == pixels(replace(OWN, max_pixels=10**9), None) == whole
    assert pixels(bounded, None) == pixels(bounded, 10**9) == pixels(OWN, small) < whole
    assert pixels(bounded, tiny) == pixels(OWN, tiny) < pixels(bounded, None)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_pixels": 0}, "expected an integer above 0"),
        ({"max_pixels": -5}, "expected an integer above 0"),
        ({"max_pixels": True}, "expected an integer above 0"),
        ({"max_pixels": "9"}, "expected an integer above 0"),
        ({"max_pixels": 1e6}, "expected an integer above 0"),
        ({"max_pixels": 100}, "this model's images have at least 3136"),
        ({"min_pixels": 100}, "mm_processor_kwargs: expected"),
        ([], "mm_processor_kwargs: expected"),
    ],
)
def test_other_processor_options_are_refused(
    tiny_model: TinyModels, options: Any, complaint: str
) -> None:
    prompt = Prompt(prompt="x", images=[noise(90, 60)], mm_processor_kwargs=options)
    with pytest.raises(InputError, match=complaint):
        processor(tiny_model("glm4v"))(prompt)


def test_limits_of_a_request(tiny_model: TinyModels) -> None:
    inputs = processor(tiny_model("glm4v"))
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": data_url(30, 30)}] * 3}]
    with pytest.raises(InputError, match="3 images were given; a request may show 2"):
        inputs(Prompt(messages=chat), replace(SERVED, max_images=2))
    where = r"messages\[0\].content\[0\]: the image has 30x30 pixels, more than 899"
    with pytest.raises(InputError, match=where):
        inputs(Prompt(messages=chat), replace(SERVED, max_source_pixels=899))
    with pytest.raises(InputError, match="51 characters; at most 50"):
        inputs(Prompt(text="x" * 51), replace(SERVED, max_characters=50))
    assert inputs(Prompt(messages=chat), replace(SERVED, max_images=3)).images


def test_errors_name_the_image_and_no_path_of_a_client(
    tiny_model: TinyModels, tmp_path: Path
) -> None:
    inputs = processor(tiny_model("glm4v"))
    noise(30, 30).save(tmp_path / "a.png")
    for name in ("a.png", "b.png"):
        url = str(tmp_path / name)
        content = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
        chat = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
        with pytest.raises(InputError) as raised:
            inputs(Prompt(messages=chat), SERVED)
        assert str(raised.value).startswith("messages[1].content[1]: paths are not opened")
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(InputError, match=r"images\[1\] \(.*b\.png\): no such image file"):
        inputs(Prompt(prompt="x", images=[tmp_path / "a.png", tmp_path / "b.png"]))


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([1, 1.7], r"token_ids\[1\]: expected an integer, not 1.7"),
        ([True], r"token_ids\[0\]: expected an integer, not True"),
        ([1, "2"], r"token_ids\[1\]: expected an integer, not '2'"),
        ([None], r"token_ids\[0\]"),
        ([[1]], r"token_ids\[0\]"),
        ("12", "token_ids: expected a list of integers, not str"),
        ({1: 2}, "token_ids: expected a list"),
        (5, "token_ids: expected a list"),
        ([], "the prompt is empty"),
        ([-1], "token id -1 is not in the vocabulary"),
        ([288], "token id 288 is not in the vocabulary"),
        ([2**70], "is not in the vocabulary"),
        ([1] * 2048, "2048 tokens but the model's context is 2048"),
        (np.array([1.0]), r"token_ids\[0\]"),
    ],
)
def test_token_ids_are_checked(tiny_model: TinyModels, ids: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        processor(tiny_model("llama"))(Prompt(token_ids=ids))


def test_token_ids_may_be_an_array(tiny_model: TinyModels) -> None:
    ready = processor(tiny_model("llama"))(Prompt(token_ids=np.array([1, 2, 3])))
    assert ready.token_ids == [1, 2, 3]
    assert all(type(id) is int for id in ready.token_ids)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "namespace"]
)
def test_template_options_replace_nothing(tiny_model: TinyModels, name: str) -> None:
    prompt = Prompt(prompt="x", template_options={name: []})
    with pytest.raises(InputError, match=f"template option '{name}' is reserved"):
        processor(tiny_model("llama"))(prompt)


def test_the_generation_prompt_can_be_left_out(tiny_model: TinyModels) -> None:
    inputs = processor(tiny_model("llama"))
    chat = [{"role": "user", "content": "x"}]
    without = inputs(Prompt(messages=chat, add_generation_prompt=False)).token_ids
    whole = inputs(Prompt(messages=chat)).token_ids
    assert whole[: len(without)] == without
    assert len(without) < len(whole)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"messages": "hi"}, "messages: expected a list, not str"),
        ({"messages": USER}, "messages: expected a list, not dict"),
        ({"messages": 5}, "messages: expected a list, not int"),
        ({"messages": [None]}, r"messages\[0\]: expected a mapping"),
        ({"messages": [{"role": None, "content": "x"}]}, r"messages\[0\]: expected a mapping"),
        ({"messages": [{"role": "root", "content": "x"}]}, r"messages\[0\]: unknown role 'root'"),
        ({"messages": [{"role": "user|>", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: expected"),
        ({"messages": [{"role": "system"}]}, r"messages\[0\].content: expected"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": [["x"]]}]}, r"content\[0\]: expected a mapping"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"content\[0\]: expected a mapping"),
        ({"messages": [{"role": "user", "content": [{"type": nested(9)}]}]}, "is not supported"),
        ({"messages": [{**USER, "x": nested(100)}]}, "nested deeper than 64 levels"),
        ({"messages": [{**USER, "x": nested(100_000)}]}, "nested deeper than 64 levels"),
        ({"messages": [{**USER, "x": object()}]}, r"messages\[0\].x: a object object is no JSON"),
        ({"messages": [{**USER, 5: "x"}]}, r"messages\[0\]: the key 5 is no string"),
        ({"messages": [{"role": "user", "content": "a\ud800b"}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "lone"),
        ({"prompt": "\ud83d"}, "lone surrogate"),
        ({"prompt": 5}, "expected a string"),
        ({"text": "\ud83d"}, "text: character 0 is the lone surrogate"),
        ({"text": 5}, "text: expected a string, not a int object"),
        ({"messages": [USER], "tools": "x"}, "tools: expected a list"),
        ({"messages": [USER], "tools": ["x"]}, r"tools\[0\]: expected a mapping, not str"),
        ({"messages": [USER], "tools": [{"a": {1, 2}}]}, r"tools\[0\].a: a set object is no JSON"),
        ({"messages": [USER], "tools": [{"a": float("nan")}]}, r"tools\[0\].a: nan is no JSON"),
        ({"messages": [USER], "tools": [{"a": print}]}, r"tools\[0\].a: a builtin_function"),
        ({"messages": [USER], "template_options": {"x": {3}}}, "template_options.x"),
        ({"messages": [USER], "template_options": ["x"]}, "template_options: expected a mapping"),
    ],
)
def test_malformed_requests_are_named(
    tiny_model: TinyModels, request_: dict[str, Any], complaint: str
) -> None:
    for family in ("glm4v", "llama"):
        with pytest.raises(InputError, match=complaint) as raised:
            processor(tiny_model(family))(Prompt(**request_), SERVED)
        assert len(str(raised.value)) < 300


def test_an_assistants_turn_needs_no_content(tiny_model: TinyModels) -> None:
    call = {"function": {"name": "tap", "arguments": "{}"}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER]
    assert processor(tiny_model("llama"))(Prompt(messages=chat)).token_ids


def test_images_are_looked_for_in_image_parts_alone(tiny_model: TinyModels) -> None:
    """The template takes any part with a key `image` for one."""
    part = {"type": "text", "text": "x", "image": "a.png", "video": "b.mp4"}
    inputs = processor(tiny_model("glm4v"))
    odd = inputs(Prompt(messages=[{"role": "user", "content": [part]}])).token_ids
    plain = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert odd == inputs(Prompt(messages=plain)).token_ids


def test_huge_strings_are_refused_or_counted(tiny_model: TinyModels) -> None:
    inputs = processor(tiny_model("llama"))
    for text in ("a" * 200_000, "<|im_end|>" * 20_000, "🌍" * 50_000, " " * 200_000):
        with pytest.raises(InputError, match="tokens but the model's context is 2048"):
            inputs(Prompt(prompt=text), SERVED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "image", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON},
    optional={
        "content": JSON
        | st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["text", "image", "image_url", "file"])},
                optional={"text": JSON, "image_url": JSON, "url": JSON, "base64": JSON},
            ),
            max_size=3,
        ),
        "name": JSON,
        "tool_calls": JSON,
    },
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=JSON | st.lists(MESSAGE, max_size=4), tools=JSON, options=JSON)
def test_any_json_is_a_prompt_or_an_input_error(
    tiny_model: TinyModels, messages: Any, tools: Any, options: Any
) -> None:
    model = tiny_model("glm4v")
    inputs = _PROCESSORS.setdefault("glm4v", processor(model))
    prompt = Prompt(messages=messages, tools=tools, template_options=options)
    with contextlib.suppress(InputError):
        assert isinstance(inputs(prompt, SERVED), PreparedPrompt)


_PROCESSORS: dict[str, InputProcessor] = {}
