"""Who is measured: peers, the programs behind them, and the workloads they take part in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT, AGENT, VISION = "text", "agent", "vision"
ALL = (TEXT, AGENT, VISION)
LANGUAGE = (TEXT, AGENT)
# Its FP32 answers are what the other peers' are compared with.
REFERENCE = "transformers-fp32"


@dataclass(frozen=True)
class Program:
    """A worker script `workers/<worker>_worker.py` and the environment that it runs in.

    environment: a name of environments.ENVIRONMENTS; None for this project's own.
    """

    worker: str
    environment: str | None


GLMCOMPILE = Program("glmcompile", None)
TRANSFORMERS = Program("transformers", "transformers")
ONNXRUNTIME_GENAI = Program("onnxruntime_genai", "onnxruntime-genai")
OPENVINO = Program("openvino", "openvino")
LLAMA_CPP = Program("llama_cpp", "llama.cpp")
VLLM = Program("vllm", "vllm")
LLM_COMPRESSOR = Program("llmcompressor", "llmcompressor")


@dataclass(frozen=True)
class Peer:
    """One way to run the checkpoint.

    precision: of the weights, as the program names it. converter: writes the model that `program`
    loads; None where that is the checkpoint itself. options: for loading.
    """

    name: str
    program: Program
    precision: str
    converter: Program | None = None
    workloads: tuple[str, ...] = (TEXT,)
    options: Mapping[str, Any] = field(default_factory=dict)


# The fastest of those tried on a processor with VNNI (the defaults: bf16 and groups of 32).
OPENVINO_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}

PEERS = (
    Peer("glmcompile-int8", GLMCOMPILE, "int8", GLMCOMPILE, ALL),
    Peer("glmcompile-fp32", GLMCOMPILE, "fp32", GLMCOMPILE, ALL),
    Peer("transformers-fp32", TRANSFORMERS, "fp32", workloads=ALL),
    Peer("transformers-bf16", TRANSFORMERS, "bf16", workloads=ALL),
    Peer("onnxruntime-genai-int4", ONNXRUNTIME_GENAI, "int4", ONNXRUNTIME_GENAI, LANGUAGE),
    Peer("onnxruntime-genai-int8", ONNXRUNTIME_GENAI, "int8", ONNXRUNTIME_GENAI, LANGUAGE),
    Peer("onnxruntime-genai-fp32", ONNXRUNTIME_GENAI, "fp32", ONNXRUNTIME_GENAI, LANGUAGE),
    Peer("openvino-int8", OPENVINO, "int8", OPENVINO, LANGUAGE, OPENVINO_OPTIONS),
    Peer("openvino-q8_0", OPENVINO, "q8_0", LLAMA_CPP),
    # Each is the faster one somewhere: flash in prefill, the other in decoding long contexts.
    Peer("llama.cpp-q8_0-flash", LLAMA_CPP, "q8_0", LLAMA_CPP, LANGUAGE, {"flash_attention": True}),
    Peer("llama.cpp-q8_0", LLAMA_CPP, "q8_0", LLAMA_CPP, LANGUAGE, {"flash_attention": False}),
    Peer("vllm-bf16", VLLM, "bf16", workloads=LANGUAGE),
    Peer("vllm-w8a8", VLLM, "w8a8", LLM_COMPRESSOR, LANGUAGE),
)
