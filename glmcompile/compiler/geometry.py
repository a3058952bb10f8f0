"""What a checkpoint's weights are used for, by their shapes alone; nothing of them is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from glmcompile.bench.rates import Layer
from glmcompile.checkpoint import Checkpoint
from glmcompile.contract import DECODER, PROCESSED, VISION, Attention, Contract
from glmcompile.quantize.packing import BLOCK_K, BLOCK_N

PATCH, MERGED, TOKEN, SAMPLED = "patch", "merged patch", "token", "sampled token"
REST = "rest"  # the unit of what lies outside the layers


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight. rows: what it is multiplied with, one row for each of PATCH..."""

    out_features: int
    in_features: int
    rows: str
    unit: str  # the layer, or other part, that is compiled together with it

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features

    def bytes(self, precision: str) -> int:
        """In an engine, scales and padding included."""
        if precision == "fp32":
            return 4 * self.parameters
        rows = -(-self.out_features // BLOCK_N) * BLOCK_N
        columns = -(-self.in_features // BLOCK_K) * BLOCK_K
        return rows * columns + 8 * self.out_features + 4 * self.in_features


@dataclass(frozen=True)
class Geometry:
    """A model's linear layers and the parameters that are none.

    table: rows and channels of the embedding; tied: whether lm_head is the same matrix.
    other: parameters that stay in float32 in every precision.
    layers, vision_layers: how many; vision_width: channels between the vision layers.
    vision_inner: channels inside their MLPs; inner: inside the decoder's.
    patch_values: of one patch. merged: patches that become one image feature.
    """

    matrices: tuple[Matrix, ...]
    table: Matrix
    tied: bool
    other: int
    layers: int
    vision_layers: int
    vision_width: int
    vision_inner: int
    inner: int
    patch_values: int = 0
    merged: int = 1

    @property
    def parameters(self) -> int:
        linear = sum(matrix.parameters for matrix in self.matrices)
        return linear + self.other + (0 if self.tied else self.table.parameters)

    def engine_bytes(self, precision: str) -> int:
        """Of weights.bin."""
        linear = sum(matrix.bytes(precision) for matrix in self.matrices)
        return linear + 4 * self.other + (0 if self.tied else self.table.bytes(precision))

    def decode_bytes(self, precision: str) -> int:
        """Weights that one token reads, of the embedding one row."""
        own = (m for m in self.matrices if m.rows in (TOKEN, SAMPLED))
        return sum(matrix.bytes(precision) for matrix in own)

    def operations(self, rows: dict[str, int]) -> int:
        """Of the linear layers, two per multiply-accumulate, for so many patches and tokens."""
        return sum(2 * each.parameters * rows.get(each.rows, 0) for each in self.matrices)

    def layer(self, model: Contract) -> Layer:
        """One of the decoder's layers."""
        return self._layer(TOKEN, model.hidden_size, self.inner, model.attention[0])

    def vision_layer(self, model: Contract) -> Layer | None:
        """One of the vision encoder's layers; None without one."""
        if model.vision is None or not model.vision.attention:
            return None
        attention = model.vision.attention[0]
        return self._layer(PATCH, self.vision_width, self.vision_inner, attention, paged=False)

    def _layer(
        self, rows: str, width: int, inner: int, attention: Attention, **kind: bool
    ) -> Layer:
        shape = (attention.heads, attention.kv_heads, attention.head_size)
        plain = Layer(width, inner, False, *shape, **kind)
        units = {m.unit for m in self.matrices if m.rows == rows and m.unit != REST}
        largest = max(self._parameters(unit) for unit in units)
        return replace(plain, gated=largest > plain.parameters + width * inner // 2)

    def _parameters(self, unit: str) -> int:
        return sum(matrix.parameters for matrix in self.matrices if matrix.unit == unit)

    @property
    def largest_unit(self) -> int:
        """Parameters of the largest part that is compiled at a time."""
        units = {matrix.unit for matrix in self.matrices}
        return max(self.table.parameters, *map(self._parameters, units))


def geometry(checkpoint: Checkpoint) -> Geometry:
    """Read a checkpoint's geometry off its configuration and the shapes of its weights."""
    structure, model = checkpoint.structure, checkpoint.model
    with torch.device("meta"):
        network = checkpoint.model_class._from_config(checkpoint.config)
    tables = {
        f"{path}.weight"
        for path, module in network.named_modules()
        if isinstance(module, nn.Embedding)
    }
    layers = [path for paths in structure.layers.values() for path in paths]
    vision_layers = structure.layers.get(VISION, [])
    in_vision = structure.called.get(VISION, frozenset()) - structure.called[DECODER]
    lm_head, embedding = f"{structure.head}.weight", f"{structure.table}.weight"
    shapes = {name: stored.shape for name, stored in checkpoint.parameters.items()}
    for name, source in checkpoint.tied.items():
        shapes[name] = checkpoint.parameters[source].shape
    matrices, other = [], 0
    patch = 0
    if model.vision is not None:
        shape = model.encoder.having(PROCESSED)[0].shape
        patch = math.prod(size for size in shape if not isinstance(size, str))
    for name, shape in shapes.items():
        if name == embedding:
            continue
        if len(shape) < 2 or name in tables:
            other += math.prod(shape)
            continue
        out_features, in_features = shape[0], math.prod(shape[1:])
        unit = next((path for path in layers if name.startswith(f"{path}.")), REST)
        if name == lm_head:
            rows, unit = SAMPLED, "lm_head"
        elif name.rpartition(".")[0] not in in_vision:
            rows = TOKEN
        elif unit != REST or in_features == patch:
            rows = PATCH
        else:
            rows = MERGED
        matrices.append(Matrix(out_features, in_features, rows, unit))
    own = [m for m in matrices if m.unit in vision_layers]
    table = shapes[embedding]
    return Geometry(
        tuple(matrices),
        Matrix(table[0], table[1], TOKEN, "embedding"),
        lm_head in checkpoint.tied,
        other,
        len(structure.layers[DECODER]),
        len(vision_layers),
        _vision_width(model),
        max((m.in_features for m in own), default=0),
        max(m.in_features for m in matrices if m.rows == TOKEN),
        patch,
        max(1, round(structure.patches_per_token)),
    )


def _vision_width(model: Contract) -> int:
    if model.vision is None or not model.vision.attention:
        return 0
    return model.vision.attention[0].heads * model.vision.attention[0].head_size
