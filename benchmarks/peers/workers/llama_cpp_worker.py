"""llama.cpp through llama-cpp-python's low-level interface, and mtmd for images."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from protocol import Clock, run_tool, sees, serve

CONVERTER = Path(sys.prefix) / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
BATCH = 2048
MICRO_BATCH = 512
CELLS = 256  # contexts are padded to multiples of this
# mtmd adds GLM-4V's tokens around an image itself.
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"


@dataclass(frozen=True)
class Entry:
    """A token of a batch; `output` asks for its logits."""

    token: int
    position: int
    sequence: int
    output: bool


class LlamaCpp:
    def prepare(self, checkpoint: str, model: str, precision: str) -> None:
        """Convert with llama.cpp's own script: the decoder, and the vision encoder if any."""
        Path(model).mkdir(parents=True, exist_ok=True)
        convert = [sys.executable, str(CONVERTER), checkpoint, "--outtype", precision]
        run_tool([*convert, "--outfile", f"{model}/model.gguf"])
        if sees(checkpoint):
            run_tool([*convert, "--mmproj", "--outfile", f"{model}/mmproj.gguf"])

    def load(
        self, checkpoint: str, model: str, threads: int, precision: str, flash_attention: bool
    ) -> dict[str, Any]:
        llama_cpp.llama_backend_init()
        self._threads = threads
        kinds = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._attention = kinds[flash_attention]
        self._model = _made(
            llama_cpp.llama_model_load_from_file(
                f"{model}/model.gguf".encode(), llama_cpp.llama_model_default_params()
            ),
            f"{model}/model.gguf",
        )
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._contexts: dict[tuple[int, int], Any] = {}
        projector = Path(model) / "mmproj.gguf"
        self._vision = self._open_vision(projector) if projector.exists() else None
        return {
            "precision": precision,
            "n_batch": BATCH,
            "n_ubatch": MICRO_BATCH,
            "flash_attention": flash_attention,
            "kv_cache": "f16",
            "kv_unified": False,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def generate(self, requests: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        if any(request.get("images") for request in requests):
            (request,) = requests
            return [self._see(request, tokens)]
        longest = max(len(request["token_ids"]) for request in requests)
        context = self._context(len(requests), longest + tokens)
        clock = Clock()
        batch = [
            Entry(token, position, sequence, position == len(request["token_ids"]) - 1)
            for sequence, request in enumerate(requests)
            for position, token in enumerate(request["token_ids"])
        ]
        answers: list[dict[str, Any]] = [{"tokens": [], "seconds": []} for _ in requests]
        for _ in range(tokens):
            chosen = self._decode(context, batch)
            now = clock()
            for entry, token in chosen:
                answers[entry.sequence]["tokens"].append(token)
                answers[entry.sequence]["seconds"].append(now)
            batch = [
                Entry(token, entry.position + 1, entry.sequence, True) for entry, token in chosen
            ]
        return answers

    def _see(self, request: dict[str, Any], tokens: int) -> dict[str, Any]:
        """One request with images."""
        context = self._context(1, len(request["token_ids"]) + tokens)
        clock = Clock()
        position, vision = ctypes.c_int32(0), 0.0
        last, no_callback = ctypes.byref(position), mtmd.mtmd_helper_post_decode_callback()
        with self._chunks(request) as chunks:
            for index in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, index)
                place = (position.value, 0, BATCH)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    _check(
                        mtmd.mtmd_helper_eval_chunk_single(
                            self._vision, context, chunk, *place, True, last
                        )
                    )
                    continue
                began = clock()
                _check(mtmd.mtmd_encode_chunk(self._vision, chunk))
                features = mtmd.mtmd_get_output_embd(self._vision)
                vision += clock() - began
                _check(
                    mtmd.mtmd_helper_decode_image_chunk(
                        self._vision, context, chunk, features, *place, last, no_callback, None
                    )
                )
        answer: dict[str, Any] = {"tokens": [], "seconds": [], "vision_seconds": vision}
        token = self._best(context, -1)
        for place in range(position.value, position.value + tokens):
            answer["tokens"].append(token)
            answer["seconds"].append(clock())
            if len(answer["tokens"]) < tokens:
                ((_, token),) = self._decode(context, [Entry(token, place, 0, True)])
        return answer

    @contextmanager
    def _chunks(self, request: dict[str, Any]) -> Iterator[Any]:
        """The request as mtmd's chunks of text and images."""
        with ExitStack() as stack:
            bitmaps = []
            for path in request["images"]:
                bitmap = mtmd.mtmd_helper_bitmap_init_from_file(self._vision, path.encode(), False)
                bitmaps.append(_made(bitmap, path))
                stack.callback(mtmd.mtmd_bitmap_free, bitmap)
            text = request["text"].encode()
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            _check(
                mtmd.mtmd_tokenize(
                    self._vision,
                    chunks,
                    ctypes.byref(mtmd.mtmd_input_text(text, len(text), False, True)),
                    (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps),
                    len(bitmaps),
                )
            )
            yield chunks

    def _decode(self, context: Any, entries: list[Entry]) -> list[tuple[Entry, int]]:
        """Compute a batch; the likeliest next token of every entry that asks for output."""
        chosen = []
        batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            batch.n_tokens = len(part)
            for index, entry in enumerate(part):
                batch.token[index], batch.pos[index] = entry.token, entry.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, entry.sequence
                batch.logits[index] = entry.output
            _check(llama_cpp.llama_decode(context, batch))
            chosen += [
                (entry, self._best(context, index))
                for index, entry in enumerate(part)
                if entry.output
            ]
        llama_cpp.llama_batch_free(batch)
        return chosen

    def _best(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _context(self, sequences: int, length: int) -> Any:
        """An empty context of a size; one that was used before has its memory in place."""
        size = sequences, -(-length // CELLS) * CELLS
        if size not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = size[0] * size[1], sequences
            params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
            params.n_threads = params.n_threads_batch = self._threads
            params.flash_attn_type = self._attention
            params.kv_unified = False
            context = llama_cpp.llama_init_from_model(self._model, params)
            self._contexts[size] = _made(context, f"a context of {size}")
        context = self._contexts[size]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _open_vision(self, projector: Path) -> Any:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads = False, self._threads
        params.media_marker = IMAGE.encode()
        params.flash_attn_type = self._attention
        return _made(
            mtmd.mtmd_init_from_file(str(projector).encode(), self._model, params), str(projector)
        )


def _made(pointer: Any, what: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp could not open {what}; its log says why")
    return pointer


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"llama.cpp returned status {status}; its log says why")


if __name__ == "__main__":
    serve(LlamaCpp())
