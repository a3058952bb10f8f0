"""The special tokens of each type: their text, their ids, and the config fields that name them."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.architectures.tables import each, words

BYTES = 256

# What a token is for -> how checkpoints of the type write it. Others are written <|role|>.
COMMON = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "turn": "<|im_start|>"}
QWEN = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
GLM = {
    "image": "<|image|>",
    "video": "<|video|>",
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
}
LLAVA = {"image": "<image>", "video": "<video>"}
INTERNVL = {
    "image": "<IMG_CONTEXT>",
    "context_image": "<IMG_CONTEXT>",
    "start_image": "<img>",
    "end_image": "</img>",
    "video": "<video>",
}

GEMMA = {
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "image": "<image_soft_token>",
    "boi": "<start_of_image>",
    "eoi": "<end_of_image>",
}
IDEFICS = {
    "image": "<image>",
    "fake_image": "<fake_token_around_image>",
    "end_of_utterance": "<end_of_utterance>",
    "global_image": "<global-img>",
    **{f"row_{i}_col_{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)},
}
MINICPM = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "image_start": "<image>",
    "image_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "image_id_start": "<image_id>",
    "image_id_end": "</image_id>",
}
OPT = {"bos": "</s>", "eos": "</s>", "pad": "<pad>", "image": "<image>"}

TOKENS: dict[str, dict[str, str | tuple[str, ...]]] = {
    **each("glm4v glm46v glm4v_moe glm_ocr glmga glm5_next", GLM),
    **each(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp cosmos3_omni "
        "video_llama_3 exaone4_5 hyperclovax_vision_v2 cosmos3_edge hy_v4_vl lfm3_vl",
        QWEN,
    ),
    **each(
        "llava llava_next llava_onevision llava_next_video video_llava vipllava fast_vlm "
        "granite4_vision",
        LLAVA,
    ),
    **each("internvl qianfan_ocr", INTERNVL),
    "qianfan_ocr": INTERNVL | {"placeholder": "<image>"},
    "aya_vision": {
        "image": "<|IMG_PATCH|>",
        "placeholder": "<image>",
        "start_of_img": "<|START_OF_IMG|>",
        "end_of_img": "<|END_OF_IMG|>",
    },
    "aria": {"image": "<|img|>", "unk": "<unk>"},
    **each("janus deepseek_vl deepseek_vl_hybrid", {"image": "<image_placeholder>"}),
    "janus": {
        "image": "<image_placeholder>",
        "boi": "<begin_of_image>",
        "eoi": "<end_of_image>",
    },
    **each("gemma3 shieldgemma2 t5gemma2", GEMMA),
    **each(
        "gemma4 gemma4_unified diffusion_gemma",
        GEMMA
        | {
            "image": "<|image|>",
            "boi": "<|image>",
            "eoi": "<image|>",
            "video": "<|video|>",
            "audio": "<|audio|>",
            "boa": "<|audio>",
            "eoa": "<audio|>",
        },
    ),
    "gemma3n": {
        "bos": "<bos>",
        "eos": "<eos>",
        "pad": "<pad>",
        "boi": "<start_of_image>",
        "boa": "<start_of_audio>",
        "eoi": "<end_of_image>",
        "image": "<image_soft_token>",
        "eoa": "<end_of_audio>",
        "audio": "<audio_soft_token>",
    },
    "paligemma": GEMMA | {"image": "<image>"},
    **each("idefics2 idefics3 smolvlm", IDEFICS),
    **each("blip-2 instructblip instructblipvideo", OPT),
    **each(
        "got_ocr2 pp_chart2table",
        {"image": "<imgpad>", "image_start": "<img>", "image_end": "</img>"},
    ),
    **each(
        "mistral3 mistral_large4",
        {"image": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"},
    ),
    "lighton_ocr": {
        "image": "<|image_pad|>",
        "image_break": "<|vision_pad|>",
        "image_end": "<|vision_end|>",
    },
    "mllama": {"image": "<|image|>", "bos": "<|begin_of_text|>"},
    "florence2": {"image": "<image>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    "kosmos-2": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "paddleocr_vl": {
        "image": "<|IMAGE_PLACEHOLDER|>",
        "vision_start": "<|IMAGE_START|>",
        "vision_end": "<|IMAGE_END|>",
    },
    "ernie4_5_vl_moe": {
        "image": "<|IMAGE_PLACEHOLDER|>",
        "image_start": "<|IMAGE_START|>",
        "image_end": "<|IMAGE_END|>",
        "video": "<|VIDEO_PLACEHOLDER|>",
        "video_start": "<|VIDEO_START|>",
        "video_end": "<|VIDEO_END|>",
    },
    "cohere_compass": QWEN | {"image": "<|IMAGE_PAD|>", "video": "<|VIDEO_PAD|>"},
    "cohere2_vision": {
        "image": "<|IMG_PATCH|>",
        "boi": "<|START_OF_IMG|>",
        "eoi": "<|END_OF_IMG|>",
        "img_line_break": "<|IMG_LINE_BREAK|>",
    },
    "chameleon": {
        "image": "<image>",
        "boi": "<racm3:break>",
        "eoi": "<eoss>",
        "sep": "<reserved08706>",
    },
    "emu3": {
        "image": "<image>",
        "boi": "<|image start|>",
        "eoi": "<|image end|>",
        "image_wrapper": "<|image token|>",
        "eol": "<|extra_200|>",
        "eof": "<|extra_201|>",
        "bos": "<|extra_203|>",
    },
    **each("deepseek_ocr2 granite_docling", {"image": "<image>"}),
    "granite_docling": {
        "image": "<image>",
        "fake_image": "<fake_token_around_image>",
        "global_image": "<global-img>",
    },
    "fuyu": {"image": "|SPEAKER|", "image_newline": "|NEWLINE|"},
    "hunyuan_vl": {
        "image": "<image>",
        "image_start": "<img>",
        "im_start": "<img>",
        "image_end": "</img>",
        "im_end": "</img>",
        "im_newline": "<br>",
    },
    "idefics": {"image": "<image>", "fake_image": "<fake_token_around_image>", "bos": "<s>"},
    "kosmos-2.5": {"boi": "<image>", "eoi": "</image>", "image": "<s>"},
    **each("minicpm_ocr minicpmv4_6 minicpmv4_7", MINICPM),
    "minimax_m3_vl": {
        "image": "]<]image[>[",
        "video": "]<]video[>[",
        "vision_start": "]<]start of image[>[",
        "vision_end": "]<]end of image[>[",
    },
    "molmo2": {
        "image": "<|image|>",
        "video": "<|video|>",
        "image_patch": "<im_patch>",
        "im_col": "<im_col>",
        "image_start": "<im_start>",
        "low_res_image_start": "<low_res_im_start>",
        "image_end": "<im_end>",
        "frame_start": "<frame_start>",
        "frame_end": "<frame_end>",
        "im_low": "<im_low>",
    },
    **each(
        "muse_glimmer muse_spark",
        {
            "image": "<|patch|>",
            "image_start": "<|image_start|>",
            "image_end": "<|image_end|>",
            "video": "<|video|>",
            "video_sep": "<|vid_frame_separator|>",
            "video_start": "<|vid_start|>",
            "video_end": "<|vid_end|>",
        },
    ),
    "step3p7": {
        "image": "<im_patch>",
        "image_start": "<im_start>",
        "image_end": "<im_end>",
        "patch_start": "<patch_start>",
        "patch_end": "<patch_end>",
        "patch_newline": "<patch_newline>",
    },
    "nemotron_h_omni": {
        "image": "<image>",
        "video": "<video>",
        "audio": "<so_embedding>",
        "audio_start": "<so_start>",
        "audio_end": "<so_end>",
        "image_start": "<img>",
        "image_end": "</img>",
    },
    "dots3_note": QWEN | {"image": "<|imgpad|>"},
    "apertus1p5": {
        "image": "<|image|>",
        "audio": "<|audio|>",
        "boi": "<|img_start|>",
        "eoi": "<|img_end|>",
        "image_wrapper": "<|img_token|>",
        "eol": "<|img_line|>",
        "boa": "<|audio_start|>",
        "eoa": "<|audio_end|>",
    },
    "unlimited_ocr": {"image": "<image>"},
    **each(
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker",
        {
            "image": "<|IMAGE|>",
            "video": "<|VIDEO|>",
            "audio": "<|AUDIO|>",
            "vision_bos": "<|vision_bos|>",
            "vision_start": "<|vision_bos|>",
            "vision_eos": "<|vision_eos|>",
            "vision_end": "<|vision_eos|>",
            "audio_bos": "<|audio_bos|>",
            "audio_start": "<|audio_bos|>",
            "audio_eos": "<|audio_eos|>",
            "audio_end": "<|audio_eos|>",
        },
    ),
    "llama4": {
        "image": "<|patch|>",
        "placeholder": "<|image|>",
        "image_start": "<|image_start|>",
        "image_end": "<|image_end|>",
        "tile_x": "<|tile_x_separator|>",
        "tile_y": "<|tile_y_separator|>",
    },
    "ovis2": {
        "image": "<IMG_ATOM>",
        "placeholder": "<image>",
        "visual_indicator": ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    },
}

# Their processors name these tokens themselves, and trip over a tokenizer that does, too.
UNNAMED = words("blip-2 instructblip instructblipvideo idefics2 idefics3 ovis2")

SUB_CONFIGS = ("_config", "encoder", "decoder")  # endings of the fields that hold nested configs
FIELD = re.compile(r"(?P<role>\w+?)(?P<token>_token)?_(?:id|index|ids)")


def named_tokens(model_type: str, config: dict) -> dict[str, str | tuple[str, ...]]:
    """Role -> text, in the order of their ids: this type's table, then roles of config fields."""
    tokens = COMMON | TOKENS.get(model_type, {})
    for role in sorted(fields(config)):
        tokens.setdefault(role, f"<|{role}|>")
    return tokens


def texts(tokens: dict[str, str | tuple[str, ...]]) -> list[str]:
    """Each special token once, in the order of their ids."""
    every = [(text,) if isinstance(text, str) else text for text in tokens.values()]
    return list(dict.fromkeys(text for group in every for text in group))


def token_ids(tokens: dict[str, str | tuple[str, ...]]) -> dict[str, int | list[int]]:
    """Role -> id, or ids where a role has several tokens. Roles of one text share its id."""
    order = {text: BYTES + i for i, text in enumerate(texts(tokens))}
    return {
        role: order[text] if isinstance(text, str) else [order[part] for part in text]
        for role, text in tokens.items()
    }


def is_config(name: str, value: Any) -> bool:
    """Whether a field of a config's dict is a config itself."""
    layers = name == "per_layer_config"  # layer -> what differs in it
    return isinstance(value, dict) and name.endswith(SUB_CONFIGS) and not layers


def fields(config: dict) -> list[str]:
    """The roles whose ids a config's fields hold, nested ones too."""
    roles: dict[str, None] = {}
    for name, value in config.items():
        if is_config(name, value):
            roles |= dict.fromkeys(fields(value))
        elif (found := FIELD.fullmatch(name)) and found["token"] and value is not None:
            roles[found["role"]] = None
    return list(roles)


def set_token_ids(config: dict, ids: dict[str, int | list[int]]) -> None:
    """Point every field that holds a token's id at the tiny vocabulary, in nested configs too."""
    for name, value in config.items():
        if is_config(name, value):
            set_token_ids(value, ids)
        elif (found := FIELD.fullmatch(name)) and found["role"] in ids:
            config[name] = ids[found["role"]]
