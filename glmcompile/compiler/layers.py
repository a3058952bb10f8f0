"""Compiles a component layer by layer: compare, calibrate, quantize, write, verify, let go.

What crosses from one layer to the next lies on disk, so that a layer's weights are all that memory
holds, and an interrupted compile goes on at the layer it was in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.artifact import WEIGHTS
from glmcompile.calibrate.observe import PREFIX, Observe
from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.calls import (
    BLOCK_SIZE,
    OUTPUTS,
    TORCH,
    Call,
    calibration_calls,
    compared_calls,
)
from glmcompile.compiler.comparison import (
    Difference,
    ShippedError,
    compare,
    relative_error,
)
from glmcompile.compiler.samples import Sample
from glmcompile.compiler.store import Store
from glmcompile.compiler.timing import compiling, exporting
from glmcompile.contract import DECODER, KEY_CACHE, STATE, VALUE_CACHE
from glmcompile.errors import ParityError
from glmcompile.export import export_component
from glmcompile.export.save import Place, WeightsWriter, is_external, save_graph
from glmcompile.passes import simplify
from glmcompile.passes.cut import BEGIN, Segment, cut, last_uses
from glmcompile.progress import Progress
from glmcompile.quantize.graph import quantize_graph
from glmcompile.quantize.schemes import Recipe
from glmcompile.runtime.model_runner import cache_dtype
from glmcompile.targets.cpu import open_session
from glmcompile.targets.cpu.lower import lower

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Work:
    """What every component's compile needs.

    plan: how to quantize; None writes float32 and calibrates nothing.
    torch: what torch computed for `compared` (see reference.compute).
    """

    checkpoint: Checkpoint
    plan: Recipe | None
    compared: Sequence[Sample]
    calibration: Sequence[Sample]
    torch: Activations
    store: Store
    progress: Progress


@dataclass(frozen=True)
class Compiled:
    """What a component's compile found.

    schemes: of each linear layer, by its name; empty in float32.
    """

    schemes: dict[str, str]
    parity: list[dict[str, Any]]
    shipped: list[dict[str, Any]]


def compile_component(work: Work, component: str, before: Activations | None) -> Compiled:
    """Write a component's graph and weights to the store's engine.

    before: what the component before computed in the calibration calls.
    Raises ParityError for a layer that differs from torch, or whose quantized form is broken, and
    CalibrationError for one that no sample reached.
    """
    work.progress.stage(exporting(component))
    shipped = export_component(work.checkpoint, component)
    simplify(shipped)
    observed = None
    schemes: dict[str, str] = {}
    statistics: Arrays = {}
    if work.plan is not None:
        observed = shipped.clone()
        Observe()(observed)
        lower(observed)
        tied = set(work.checkpoint.tied.values())
        schemes = quantize_graph(shipped, work.plan, statistics, tied)
    lower(shipped)
    compiler = _ComponentCompiler(work, component, before, shipped, observed, statistics)
    compiler.run()
    save_graph(shipped, compiler.places, work.store.engine / f"{component}.onnx")
    return Compiled(schemes, compiler.parity, compiler.shipped)


def activations(store: Store, component: str, kind: str = "float32") -> Activations:
    """Values between a component's layers; kind: of the float32 or of the shipped graph."""
    return Activations(store.work / f"{component}.{kind}")


class _ComponentCompiler:
    """A component's segments, one after the other."""

    def __init__(
        self,
        work: Work,
        component: str,
        before: Activations | None,
        shipped: ir.Model,
        observed: ir.Model | None,
        statistics: Arrays,
    ) -> None:
        self._work = work
        self._component = component
        self._layers = list(work.checkpoint.structure.layers[component])
        self._statistics = statistics
        self._shipped_segments = cut(shipped, self._layers)
        self._observed_segments = cut(observed, self._layers) if observed is not None else None
        self._compared = compared_calls(work.checkpoint, component, work.compared, work.torch)
        self._calibration = (
            calibration_calls(work.checkpoint, component, work.calibration, before)
            if observed is not None
            else []
        )
        self._on_quantized = work.plan is not None and work.plan.inputs == "quantized"
        self._floats = activations(work.store, component)
        self._ships = activations(work.store, component, "shipped")
        floats = self._observed_segments or self._shipped_segments
        self._last_uses = (
            (self._floats, last_uses(floats)),
            (self._ships, last_uses(self._shipped_segments)),
        )
        self._last = floats[-1]
        self.places: dict[str, Place] = {}
        self.parity: list[dict[str, Any]] = []
        self.shipped: list[dict[str, Any]] = []

    def run(self) -> None:
        store, segments = self._work.store, self._shipped_segments
        if self._observed_segments is not None:
            names = [[each.name for each in part] for part in (segments, self._observed_segments)]
            assert names[0] == names[1], f"{self._component} is cut differently: {names}"
        stages = [f"{self._component}/{segment.name}" for segment in segments]
        done = sum(store.result(stage) is not None for stage in stages)
        advance = self._work.progress.stage(compiling(self._component), len(segments), done)
        weights = store.engine / WEIGHTS
        weights.touch()
        with weights.open("r+b") as file:
            writer = WeightsWriter(file)
            writer.restore(*_written(store))
            for number, (stage, segment) in enumerate(zip(stages, segments, strict=True)):
                statistics = store.work / f"{self._component}.statistics{number}.npz"
                if (result := store.result(stage)) is None:
                    result = self._compile(number, segment, writer, statistics)
                    store.record(stage, result)
                    advance(number + 1)
                elif statistics.is_file():  # of values that a later segment reads, too
                    self._statistics |= np.load(statistics)
                self.places |= _places(result)
                self.parity += result["parity"]
                self.shipped += result["shipped"]
                self._drop(number)

    def _compile(
        self, number: int, segment: Segment, writer: WeightsWriter, statistics: Path
    ) -> dict[str, Any]:
        """One segment; returns what the journal keeps of it."""
        differences: list[Difference] = []
        if self._observed_segments is not None:
            observed = self._observed_segments[number]
            session = _Opened(observed, _read_weights(observed))
            differences += self._compare(observed, _run(session, self._compared, self._floats))
            np.savez(statistics, **self._observe(session))  # type: ignore[arg-type]
            del session
        places = {
            name: writer.append(tensor)
            for name, tensor in _outside(segment).items()
            if name not in self.places
        }
        session = _Opened(segment, self._mapped(segment, self.places | places))
        errors = []
        if self._observed_segments is None:
            differences += self._compare(segment, _run(session, self._compared, self._floats))
        else:
            errors = self._verify(segment, session)
            if self._on_quantized:
                for _ in _run(session, self._calibration, self._ships):
                    pass  # what the next layer sees is written
        return {
            "places": {name: asdict(place) for name, place in places.items()},
            "end": writer.end,
            "parity": [each.to_json() for each in differences],
            "shipped": [each.to_json() for each in errors],
        }

    def _mapped(self, segment: Segment, places: Mapping[str, Place]) -> Arrays:
        """A segment's weights as they lie in the engine."""
        file = self._work.store.engine / WEIGHTS
        return {
            name: np.memmap(
                file,
                tensor.dtype.numpy(),
                "r",
                places[name].offset,
                tuple(tensor.shape.numpy()),
            )
            for name, tensor in _outside(segment).items()
        }

    def _observe(self, session: _Opened) -> Arrays:
        """Largest magnitudes, per channel, of what the segment observes in the calibration."""
        largest: Arrays = {}
        source = self._ships if self._on_quantized else self._floats
        keep = not self._on_quantized
        for _, outputs in _run(session, self._calibration, source, keep):
            for name, value in outputs.items():
                if name.startswith(PREFIX):
                    label = name.removeprefix(PREFIX)
                    known = largest.get(label)
                    largest[label] = value if known is None else np.maximum(known, value)
        largest = {label: _rounded(value) for label, value in largest.items()}
        self._statistics |= largest
        return largest

    def _compare(
        self, segment: Segment, results: Iterable[tuple[Call, Arrays]]
    ) -> list[Difference]:
        """Differences from torch of a layer's or the component's output; none at the beginning."""
        output = segment.name if segment.name in self._layers else OUTPUTS[self._component]
        last = segment is self._last
        differences = []
        for call, outputs in results:
            if segment.name not in self._layers and not last:
                continue
            expected = call.expected(self._work.torch.read(TORCH, output))
            found = [
                compare(self._component, output, call.name, expected, rows)
                for value in outputs.values()
                if (rows := _as_rows(value, expected)) is not None
            ]
            if not found:
                raise ParityError(
                    f"{self._component}: {segment.name} ({call.name}) gives nothing of torch's "
                    f"shape {list(expected.shape)}. This is a fault of the export: report it with "
                    "the checkpoint's config.json."
                )
            nearest = min(found, key=lambda each: each.max_error)
            nearest.check()
            differences.append(nearest)
        return differences

    def _verify(self, segment: Segment, session: _Opened) -> list[ShippedError]:
        """Errors of the shipped segment on the packed samples: alone, and behind the others."""
        packed = [call for call in self._compared if call.is_packed]
        alone = [outputs for _, outputs in _run(session, packed, self._floats, keep=False)]
        chain = [outputs for _, outputs in _run(session, packed, self._ships)]
        errors = []
        for name, value in alone[0].items():
            if value.dtype != np.float32 or value.ndim < 2:
                continue
            expected, change = [], []
            for call in packed:
                rows = self._floats.read(call.name, name)
                expected.append(_two_axes(rows))
                change.append(_two_axes(rows - self._before(segment, call, rows)))
            wanted = np.concatenate(expected)
            error = ShippedError(
                self._component,
                segment.name if segment.name in self._layers else name,
                relative_error(
                    wanted,
                    np.concatenate([_two_axes(each[name]) for each in alone]),
                    np.concatenate(change),
                ),
                relative_error(
                    wanted, np.concatenate([_two_axes(each[name]) for each in chain]), wanted
                ),
            )
            error.check()
            if segment.name != BEGIN or error.layer_error:  # tables of angles are not quantized
                errors.append(error)
        return errors

    def _before(self, segment: Segment, call: Call, like: NDArray[Any]) -> NDArray[Any] | float:
        """What a segment adds to: its float32 input of the output's shape; 0 without one."""
        for name in segment.inputs:
            if not is_cache(name) and not name.startswith(f"{STATE}."):
                value = _given(call, name, self._floats)
                if value.dtype == np.float32 and value.shape == like.shape:
                    return value
        return 0.0

    def _drop(self, number: int) -> None:
        """Remove values that segment `number` was the last to read."""
        for values, last in self._last_uses:
            values.drop(name for name, segment in last.items() if segment == number)
        self._work.torch.drop([self._shipped_segments[number].name])


class _Opened:
    """A segment that runs on weights where they lie.

    They are inputs of its graph: of initializers, even those given in memory, ONNX Runtime would
    make copies.
    """

    def __init__(self, segment: Segment, weights: Arrays) -> None:
        model = segment.model.clone()
        for name in weights:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        self._session = open_session(ir.to_proto(model).SerializeToString())
        self._weights = {
            name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()
        }
        self._arrays = weights  # which the values above point into
        self.outputs = [each.name for each in self._session.get_outputs()]
        self.pools = {
            each.name: (BLOCK_SIZE, *each.shape[2:])
            for each in self._session.get_inputs()
            if is_cache(each.name)
        }
        self.states = {
            each.name: tuple(each.shape[1:])
            for each in self._session.get_inputs()
            if each.name.startswith(f"{STATE}.")
        }
        self.inputs = [
            each.name
            for each in self._session.get_inputs()
            if each.name not in {**weights, **self.pools, **self.states}
        ]
        self.cache_dtype = cache_dtype(self._session) if self.pools else np.dtype(np.float32)

    def __call__(self, feeds: Mapping[str, ort.OrtValue]) -> list[NDArray[Any]]:
        outputs = self._session.run_with_ort_values(self.outputs, {**feeds, **self._weights})
        return [output.numpy() for output in outputs]


def _run(
    segment: _Opened, calls: Sequence[Call], values: Activations, keep: bool = True
) -> Iterator[tuple[Call, Arrays]]:
    """Run calls in order; each takes from `values` what its feeds lack.

    keep: write the outputs to `values`; they come back mapped then.
    """
    pools: dict[str, dict[str, ort.OrtValue]] = {}
    for number, call in enumerate(calls):
        if (segment.pools or segment.states) and call.caches not in pools:
            pools[call.caches] = {
                name: _value(np.zeros((call.blocks, *shape), segment.cache_dtype))
                for name, shape in segment.pools.items()
            } | {
                name: _value(np.zeros((call.slots, *shape), np.float32))
                for name, shape in segment.states.items()
            }
        feeds = {name: _value(_given(call, name, values)) for name in segment.inputs}
        outputs: Arrays = {}
        found = segment(feeds | pools.get(call.caches, {}))
        for name, array in zip(segment.outputs, found, strict=True):
            outputs[name] = array
            if keep and _is_read_again(call, name):
                values.write(call.name, name, array)
                outputs[name] = values.read(call.name, name)
        yield call, outputs
        later = {each.caches for each in calls[number + 1 :]}
        pools = {name: pool for name, pool in pools.items() if name in later}


def _is_read_again(call: Call, name: str) -> bool:
    """Whether a later layer, component or comparison takes an output; most logits nobody does."""
    if name.startswith(PREFIX):
        return False
    return name != OUTPUTS[DECODER] or call.is_packed


def _value(array: NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _given(call: Call, name: str, values: Activations) -> NDArray[Any]:
    given = call.given(name)
    return values.read(call.name, name) if given is None else given


def _outside(segment: Segment) -> dict[str, ir.TensorProtocol]:
    """A segment's initializers that lie outside its graph, in the order in which it reads them."""
    return {
        str(value.name): value.const_value
        for node in segment.model.graph
        for value in node.inputs
        if value is not None
        and value.is_initializer()
        and value.const_value is not None
        and is_external(value.const_value)
    }


def _read_weights(segment: Segment) -> Arrays:
    return {
        name: np.ascontiguousarray(tensor.numpy()) for name, tensor in _outside(segment).items()
    }


def _as_rows(value: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any] | None:
    """A value as [rows, channels] where it may be what torch gave."""
    if value.dtype != np.float32 or value.size != expected.size:
        return None
    return value.reshape(expected.shape) if value.shape[-1] == expected.shape[-1] else None


def _two_axes(value: NDArray[Any]) -> NDArray[Any]:
    return value.reshape(-1, value.shape[-1])


def is_cache(name: str) -> bool:
    """Whether a decoder's input is a layer's pool of keys or values."""
    return name.startswith((KEY_CACHE, VALUE_CACHE))


def _places(result: dict[str, Any]) -> dict[str, Place]:
    return {name: Place(**fields) for name, fields in result["places"].items()}


def _written(store: Store) -> tuple[dict[str, Place], int]:
    """All places that the journal knows, in every component, and where the file ends by it."""
    places: dict[str, Place] = {}
    end = 0
    for stage, result in store.results().items():
        if "/" in stage:
            places |= {f"{stage}:{name}": place for name, place in _places(result).items()}
            end = max(end, result["end"])
    return places, end


def _rounded(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to 10 bits of mantissa, as float16 has, without its limits on the exponent.

    Sums in another order move the last digits from machine to machine; these many are stable.
    """
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.rint(mantissa * 1024) / 1024, exponent).astype(np.float32)
