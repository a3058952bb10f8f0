"""Fuses the arithmetic of rotary position embedding into ONNX's RotaryEmbedding operator.

Transformers writes `x * cos + rotate(x) * sin` with a cosine per channel, where `rotate` swaps
either the halves of a head or neighbouring channels. Both tables repeat every angle twice, so the
operator (RotaryEmbedding, ONNX 23, without position ids) takes one copy: `[batch, tokens, dim/2]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from glmcompile.passes.matching import (
    constant,
    describe,
    integer,
    last_axis_slice,
    producer,
    replace,
    through,
    width,
)


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    dim: int


class FuseRotary(ir.passes.InPlacePass):
    """Requires shapes on heads' axes. Ensures RotaryEmbedding on `[1, tokens, heads * head_size]`.

    Heads that rotate only their first channels (`partial_rotary_factor`) become the operator's
    `rotary_embedding_dim`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fused = 0
        tables: dict[tuple[ir.Value, bool], ir.Value] = {}
        for node in list(model.graph):
            if node.op_type == "Add" and (match := _match(node)) is not None:
                fused += _fuse(node, match, tables)
        if fused:
            common_passes.RemoveUnusedNodesPass()(model)
            common_passes.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified=bool(fused))


def _match(add: ir.Node) -> _Match | None:
    for straight, turned in (add.inputs, tuple(reversed(add.inputs))):
        left, right = producer(straight, "Mul"), producer(turned, "Mul")
        if left is None or right is None:
            continue
        for x, cos in (left.inputs, tuple(reversed(left.inputs))):
            for rotated, sin in (right.inputs, tuple(reversed(right.inputs))):
                if x is None or cos is None or sin is None or rotated is None:
                    continue
                dim = width(x)
                interleaved = _rotation(rotated, x, dim) if dim else None
                if interleaved is not None and dim:
                    return _Match(x, cos, sin, interleaved, dim)
    return None


def _rotation(value: ir.Value, x: ir.Value, dim: int) -> bool | None:
    """False if `value` rotates x's halves, True if neighbouring channels, else None."""
    interleaved = False
    if (reshape := producer(value, "Reshape")) is not None:
        interleaved = True
        value = reshape.inputs[0]  # type: ignore[assignment]
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    first, second = concat.inputs
    if interleaved:
        first, second = (
            unsqueeze.inputs[0] if (unsqueeze := producer(each, "Unsqueeze")) is not None else None
            for each in (first, second)
        )
    negated = producer(first, "Neg")
    ahead = last_axis_slice(negated.inputs[0]) if negated is not None else None
    behind = last_axis_slice(second)
    if ahead is None or behind is None or ahead.source is not x or behind.source is not x:
        return None
    half = dim // 2
    cuts = [(each.start, each.stop, each.step) for each in (ahead, behind)]
    expected = [(1, dim, 2), (0, dim, 2)] if interleaved else [(half, dim, 1), (0, half, 1)]
    return interleaved if cuts == expected else None


def _fuse(add: ir.Node, match: _Match, tables: dict[tuple[ir.Value, bool], ir.Value]) -> bool:
    x, result = match.x, add.outputs[0]
    head_size = match.dim
    # A head that rotates only in part is cut before and joined again after.
    if (cut := last_axis_slice(x)) is not None and cut.start == 0:
        uses = result.consumers()
        rest = uses[0].inputs[-1] if len(uses) == 1 and uses[0].op_type == "Concat" else None
        other = last_axis_slice(rest)
        if other is not None and other.source is cut.source and other.start == match.dim:
            x, result, head_size = cut.source, uses[0].outputs[0], other.stop

    transposed = producer(x, "Transpose")
    heads_first = transposed is not None and _swaps_heads(transposed)
    flat = transposed.inputs[0] if heads_first and transposed is not None else x
    if flat is None or flat.shape is None or len(flat.shape) < 3:
        return False
    heads = flat.shape[-2]
    if not isinstance(heads, int):
        return False

    tape = ir.tape.Tape(add.graph)
    rotary = tape.op(
        "RotaryEmbedding",
        [
            _reshape(tape, flat, [1, -1, heads * head_size]),
            _table(match.cos, match, tables),
            _table(match.sin, match, tables),
        ],
        attributes={
            "interleaved": int(match.interleaved),
            "num_heads": heads,
            "rotary_embedding_dim": match.dim if match.dim < head_size else 0,
        },
    )
    shape = [each if isinstance(each, int) else -1 for each in flat.shape]
    rotated = _reshape(tape, rotary, shape, like=flat)
    if heads_first:
        for use in list(result.consumers()):
            if _swaps_heads(use):
                replace(use.outputs[0], rotated)
        turned = tape.op("Transpose", [rotated], attributes={"perm": [0, 2, 1, 3]})
        describe(turned, like=result)
        rotated = turned
    replace(result, rotated)
    return True


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (0, 2, 1, 3)


def _table(
    value: ir.Value, match: _Match, tables: dict[tuple[ir.Value, bool], ir.Value]
) -> ir.Value:
    """One copy of each angle, `[1, tokens, dim/2]`, from a table that repeats it."""
    base = through(value, "Unsqueeze")
    key = (base, match.interleaved)
    if key not in tables:
        node = base.producer()
        assert node is not None and node.graph is not None
        tape = ir.tape.Tape(node.graph)
        half = None if match.interleaved else _first_half(node)
        if half is None:
            start, stop, step = (0, match.dim, 2) if match.interleaved else (0, match.dim // 2, 1)
            bounds = [_integers(tape, [each]) for each in (start, stop, -1, step)]
            half = tape.op("Slice", [base, *bounds])
        tables[key] = _reshape(tape, half, [1, -1, match.dim // 2])
    return tables[key]


def _first_half(table: ir.Node) -> ir.Value | None:
    """What Concat repeats to make a table, up to its shape; None for a table made otherwise.

    Vision encoders join the angles of rows and columns, which lie in order already.
    """
    if table.op_type != "Concat" or len(table.inputs) != 2 or len({*table.inputs}) != 1:
        return None
    half = table.inputs[0]
    join = producer(half, "Concat")
    if half is None or join is None or integer(join, "axis", 0) != -1:
        return half
    cuts = [producer(part, "Gather") for part in join.inputs]
    sources = {cut.inputs[0] for cut in cuts if cut is not None and integer(cut, "axis", 0) == 1}
    source = sources.pop() if len(sources) == 1 else None
    if source is None or source.shape is None or len(source.shape) != 3 or None in cuts:
        return half
    indices = [constant(cut.inputs[1]) for cut in cuts if cut is not None]
    in_order = all(index is not None and index == place for place, index in enumerate(indices))
    return source if in_order and len(cuts) == source.shape[1] else half


def _integers(tape: ir.tape.Tape, numbers: list[int]) -> ir.Value:
    return tape.op("Constant", [], attributes={"value_ints": numbers})


def _reshape(
    tape: ir.tape.Tape, value: ir.Value, shape: list[int], like: ir.Value | None = None
) -> ir.Value:
    result = tape.op("Reshape", [value, _integers(tape, shape)])
    result.dtype = ir.DataType.FLOAT
    result.shape = (
        like.shape
        if like is not None
        else ir.Shape([each if each >= 0 else None for each in shape])
    )
    return result
