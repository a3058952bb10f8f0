"""What an engine's components take and give, and how they are joined.

Found when a checkpoint is compiled, stored in the manifest, and all that the runtime knows of a
model: it binds by role and never asks which architecture it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VISION, DECODER = "vision_encoder", "decoder"
COMPONENTS = (VISION, DECODER)  # in the order in which data flows through them

# Roles of ports. Those of one layer or of one of several features carry a number.
PROCESSED = "processed"  # an array that the image processor gives
COMPUTED = "computed"  # an array that follows from the images' grids, see VisionContract.computed
FEATURES = "features"  # what the vision encoder gives for each image token
FEATURE_ROWS = "feature_rows"  # the packed tokens that take them
TOKEN_IDS, POSITIONS, LOGITS_ROWS, LOGITS = "token_ids", "positions", "logits_rows", "logits"
# Of each token the first and the end of its image's places in the sequence, whose tokens see each
# other; an empty span for other tokens.
IMAGE_SPANS = "image_spans"
# The packed batch, as com.microsoft::PagedAttention takes it.
SEQUENCE_ENDS, PAST_LENGTHS, BLOCK_TABLE = "sequence_ends", "past_lengths", "block_table"
KEY_CACHE, VALUE_CACHE = "key_cache", "value_cache"
# Of recurrent layers: pools with a slot for each sequence, and which slot each one has.
STATE, STATE_SLOTS = "state", "state_slots"


@dataclass(frozen=True)
class Port:
    """An input or output of a component's graph.

    shape: a string is a dynamic dimension, an int a fixed one. number: of the layer, or of the
    feature among several.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]
    number: int = 0


@dataclass(frozen=True)
class Component:
    """The ports of one graph."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def having(self, role: str) -> tuple[Port, ...]:
        """The inputs of a role, in the order of their numbers."""
        return tuple(sorted((p for p in self.inputs if p.role == role), key=lambda p: p.number))

    def input(self, role: str) -> Port | None:
        """The only input of a role; None without one."""
        found = self.having(role)
        assert len(found) <= 1
        return found[0] if found else None


@dataclass(frozen=True)
class Attention:
    """One attention layer: its heads, and how many tokens back a token sees, itself included.

    window: 0 for all.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    window: int = 0


@dataclass(frozen=True)
class Rule:
    """A function of glmcompile.rules or of an image processor, by its name, and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """Inputs of the vision encoder that a rule computes from the images' grids.

    outputs: names of the ports, in the order of the rule's results.
    """

    rule: Rule
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class VisionContract:
    """How images enter the prompt and the vision encoder.

    token_id: of the prompt's tokens those that take an image feature. placeholder: the text of one
    image in a rendered prompt. processor: makes the encoder's inputs from an image.
    attention: of the encoder's layers.
    """

    token_id: int
    placeholder: str
    processor: Rule
    computed: tuple[Computed, ...] = ()
    attention: tuple[Attention, ...] = ()


@dataclass(frozen=True)
class Contract:
    """A compiled model.

    architecture: transformers' class. attention: of the decoder's layers that have a cache, in the
    order in which they run. positions: of a prompt's tokens. position_axes: 1, or 3 for M-RoPE.
    vision: None for a text model. spans: name of the rule for ranges of a prompt whose tokens see
    each other; None where tokens see only those before them.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    attention: tuple[Attention, ...]
    positions: Rule
    position_axes: int
    components: Mapping[str, Component]
    vision: VisionContract | None = None
    spans: str | None = None

    @property
    def decoder(self) -> Component:
        return self.components[DECODER]

    @property
    def encoder(self) -> Component:
        """The vision encoder's ports. Raises KeyError for a text model."""
        return self.components[VISION]

    @property
    def image_token_id(self) -> int | None:
        return self.vision.token_id if self.vision is not None else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Contract:
        """Raises KeyError or TypeError for what `to_json` did not write."""
        vision = data["vision"]
        return cls(
            **dict(
                data,
                eos_token_ids=tuple(data["eos_token_ids"]),
                attention=_layers(data["attention"]),
                positions=Rule(**data["positions"]),
                components={
                    name: Component(*(tuple(_ports(part[side])) for side in ("inputs", "outputs")))
                    for name, part in data["components"].items()
                },
                vision=None
                if vision is None
                else VisionContract(
                    **dict(
                        vision,
                        processor=Rule(**vision["processor"]),
                        computed=tuple(
                            Computed(Rule(**each["rule"]), tuple(each["outputs"]))
                            for each in vision["computed"]
                        ),
                        attention=_layers(vision["attention"]),
                    )
                ),
            )
        )


def _layers(data: list[dict[str, int]]) -> tuple[Attention, ...]:
    return tuple(Attention(**each) for each in data)


def _ports(data: list[dict[str, Any]]) -> Iterator[Port]:
    for each in data:
        yield Port(**dict(each, shape=tuple(each["shape"])))
