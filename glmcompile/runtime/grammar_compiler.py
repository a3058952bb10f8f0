"""Grammars compiled to the tokens that they allow and force, by llguidance.

It is imported with the first grammar, and comes with the extra `serve`.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A rule made of others costs the compiler about 10 ms; a chain of thousands, a minute.
MAX_EBNF_RULES = 200
# llguidance's own limits let a lexer take 500 MB of states. Under these, a schema of sixty detailed
# tools passes.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
# Chains of references are followed recursively, and the system's 8 MB hold about 2,000 of them.
_COMPILER_STACK = 256 << 20
_CACHED = 64
_LITERAL = r'"(?:\\.|[^"\\])*"'


class GrammarCompiler:
    """Compiles grammars for one model's tokens; safe from any thread.

    The latest grammars are kept compiled. The tokenizer's own table is built with the first one,
    in some 0.6 s for 50,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        """tokenizer: without truncation and padding; vocab_size: width of the model's logits;
        end_ids: the tokens of the model's own that end an answer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(set(end_ids))
        self._lock = threading.Lock()
        self._table: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def __call__(self, grammar: Grammar) -> GrammarProcessor:
        """A processor for one answer, at its beginning.

        Raises InputError for grammars that are malformed, unsupported or too complex, and where
        llguidance is not installed.
        """
        with self._lock:
            self._table = self._table or self._make_table()
            table, matcher = self._table, self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = _on_deep_stack(lambda: self._compile(table, grammar))
            with self._lock:
                self._compiled[grammar] = matcher
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
        return GrammarProcessor(matcher.deep_copy(), self._vocab_size)

    def _make_table(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InputError(
                "grammars need llguidance, which is not installed: pip install 'glmcompile[serve]'"
            ) from error
        try:
            return LLTokenizer(
                _without_marks(self._tokenizer),
                n_vocab=self._vocab_size,
                eos_token=self._end_ids or None,
            )
        except ValueError as error:
            raise InputError(f"this model's tokenizer takes no grammars: {error}") from error

    def _compile(self, table: LLTokenizer, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        if grammar.kind == "lark":
            own = json.loads(grammar.source)
            schemas = {name: f"start: %json {text}" for name, text in own["schemas"].items()}
            parts = {"body": self._with_tokens(own["text"]), **schemas}
        else:
            parts = {"body": _lark(grammar)}
        if grammar.after is not None:
            block = f"until({json.dumps(grammar.after)})"
            if grammar.opened_by is not None:
                block = f"({json.dumps(grammar.opened_by)} {block})?"
            parts = {"answer": self._with_tokens(f"start: {block} @body"), **parts}
        grammars = [{"name": name, "lark_grammar": text} for name, text in parts.items()]
        matcher = LLMatcher(
            table,
            json.dumps({"grammars": grammars}),
            log_level=0,
            limits=LLParserLimits(verbose_errors=False, **_LIMITS),
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask builds what all copies then share
        if matcher.is_error():
            raise InputError(f"the {grammar.kind} cannot be served: {_message(matcher)}")
        return matcher

    def _with_tokens(self, lark: str) -> str:
        """Resolve `until` and the literals that are marks."""
        special = {json.dumps(text): id for text, id in _marks(self._tokenizer).items()}
        rules: dict[str, str] = {}

        def until(match: re.Match[str]) -> str:
            name = rules.setdefault(match[1], f"until_{len(rules)}")
            return f"{name} {match[1]}" if match[1] in special else name

        lark = re.sub(rf"until\(({_LITERAL})\)", until, lark)
        lark = re.sub(_LITERAL, lambda m: f"<[{special[m[0]]}]>" if m[0] in special else m[0], lark)
        for marker, name in rules.items():
            suffix = "" if marker in special else f"[suffix={marker}]"
            lark += f"\n{name}{suffix}: /(.|\\n)*/"
        return lark


class GrammarProcessor:
    """A grammar's way through one answer (a Constraint of logits.py).

    The model's end tokens are allowed where the answer may end, other special tokens and marks
    such as "<think>" never, unless a grammar of our own names them. So the answer's text has the
    form, or is the beginning of one that has.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._allowed = np.empty((1, -(-vocab_size // 32)), np.int32)  # one bit a token

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits [vocab] of what the grammar does not allow next to -inf.

        Raises InputError where the grammar has become too complex to follow.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._allowed)
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot be followed: {_message(self._matcher)}")
        bits = np.unpackbits(self._allowed.view(np.uint8)[0], count=len(logits), bitorder="little")
        # To +inf and -inf by arithmetic: a choice per token is up to eight times as slow.
        limits = bits.astype(np.float32)
        limits -= np.float32(0.5)
        limits *= np.float32(np.inf)
        np.minimum(logits, limits, out=logits)

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises InputError where the grammar has become too complex to follow, and for a token that
        it does not allow.
        """
        if not self._matcher.consume_token(token):
            raise InputError(f"the grammar cannot be followed: {_message(self._matcher)}")

    def forced(self) -> list[int]:
        """The tokens that have to come next, as the tokenizer would split their text."""
        return [] if self.finished else self._matcher.compute_ff_tokens()


def _message(matcher: LLMatcher) -> str:
    """What is wrong, without the numbered lines of the grammar that may follow."""
    message = re.split(r"\n +\d+ \| ", matcher.get_error())[0]
    return message.removesuffix("<non-verbose/>").strip()[:500]


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens, and those that llguidance takes for such: other added ones in brackets.

    (Qwen3's and GLM-4.5's "<think>" and "<tool_call>" are of the second kind.)
    """
    return {
        token.content: id
        for id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or re.fullmatch(r"<.*>", token.content, re.DOTALL)
    }


def _without_marks(tokenizer: Tokenizer) -> str:
    """The tokenizer's JSON with marks that no text reads like.

    What a grammar forces is tokenized, and "<|im_end|>" in a client's schema is to stay text.
    """
    settings = json.loads(tokenizer.to_str())
    secret = secrets.token_hex(8)
    names = {text: f"<{secret} {id}>" for text, id in _marks(tokenizer).items()}
    for token in settings["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): id for text, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    settings["post_processor"] = None  # it may add tokens by their names
    return json.dumps(settings)


def _lark(grammar: Grammar) -> str:
    """A client's grammar in llguidance's Lark form."""
    if grammar.kind == "json_schema":
        return f"start: %json {grammar.source}"
    if grammar.kind == "regex":
        return f"start: TEXT\nTEXT: /{_escaped(_unanchored(grammar.source))}/"
    if grammar.kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.source))
        return f"start: CHOICE\nCHOICE: {choices}"
    return _checked_ebnf(grammar.source)


def _checked_ebnf(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    rules = len(re.findall(r"^\s*[?!]?\w[\w-]*[^:\n\"'/]*:", text, re.MULTILINE))
    if rules > MAX_EBNF_RULES:
        raise InputError(f"the grammar has {rules} rules; at most {MAX_EBNF_RULES} are allowed")
    try:
        lark = any_to_lark(text)
    except Exception as error:  # its parser raises many kinds
        raise InputError(f"the grammar is malformed: {error}") from error
    if "%json" in lark or "@" in re.sub(r'"(\\.|[^"\\])*"|/(\\.|[^/\\])*/', "", lark):
        raise InputError("the grammar includes another one; give a JSON schema as such")
    return lark


def _unanchored(pattern: str) -> str:
    """A pattern matches as a whole here, so its anchors say nothing and are left out."""
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2:
        pattern = pattern[:-1]
    return pattern.removeprefix("^")


def _escaped(pattern: str) -> str:
    """A pattern to stand between slashes."""
    return re.sub(r"(\\.)|/|\n", lambda m: m[1] or {"/": r"\/", "\n": r"\n"}[m[0]], pattern)


def _on_deep_stack(call: Callable[[], LLMatcher]) -> LLMatcher:
    """Run in a thread of its own whose stack holds deep recursion. Raises what `call` raises."""
    result: list[LLMatcher] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    with _stack_size_lock:
        usual = threading.stack_size(_COMPILER_STACK)
        try:
            thread = threading.Thread(target=run, name="grammar compiler", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


_stack_size_lock = threading.Lock()
