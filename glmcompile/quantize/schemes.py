"""How each linear layer is to be computed: schemes as data, chosen per layer by a recipe file."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from glmcompile.errors import CalibrationError

DEFAULT_RECIPE = "default"


@dataclass(frozen=True)
class Float32:
    """The layer stays as the checkpoint has it, in float32."""


@dataclass(frozen=True)
class W8A8:
    """Int8 weights per output channel, uint8 activations per token.

    smoothing: SmoothQuant's migration strength alpha in 0..1 (Xiao et al. 2023, equation 4);
        0 leaves activations and weights as they are.
    """

    smoothing: float = 0.5


Scheme = Float32 | W8A8
SCHEMES: dict[str, type[Scheme]] = {"float32": Float32, "w8a8": W8A8}
KV_DTYPES = ("float32", "int8")
CALIBRATION_INPUTS = ("float32", "quantized")


@dataclass(frozen=True)
class Recipe:
    """What a compile quantizes and what it calibrates with.

    overrides: (layer name with shell wildcards, scheme) pairs, first match wins.
    inputs: what a layer sees in calibration, "float32" or "quantized" layers before it.
    """

    name: str
    linear: Scheme
    overrides: tuple[tuple[str, Scheme], ...] = ()
    kv_dtype: str = "int8"
    samples: int = 64
    max_tokens: int = 1024
    inputs: str = "float32"

    def scheme_for(self, layer: str) -> Scheme:
        """The scheme of the layer with this module path; parts of a merged layer go together."""
        for pattern, scheme in self.overrides:
            if fnmatchcase(layer, pattern):
                return scheme
        return self.linear

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "linear": _scheme_json(self.linear),
            "overrides": [
                {"layers": pattern, **_scheme_json(scheme)} for pattern, scheme in self.overrides
            ],
            "kv_cache": {"dtype": self.kv_dtype},
            "calibration": {
                "samples": self.samples,
                "max_tokens": self.max_tokens,
                "inputs": self.inputs,
            },
        }


def load_recipe(recipe: str | Path = DEFAULT_RECIPE) -> Recipe:
    """Read a recipe: the name of a bundled one or the path of a TOML file.

    Raises CalibrationError naming the file and the entry that is wrong.
    """
    path = Path(recipe)
    if path.suffix != ".toml":
        import calibration

        folder = Path(calibration.__file__).parent / "recipes"
        path = folder / f"{recipe}.toml"
        if not path.is_file():
            bundled = ", ".join(sorted(each.stem for each in folder.glob("*.toml")))
            raise CalibrationError(
                f"recipe {recipe}: no such bundled recipe ({bundled}); a file must end in .toml."
            )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot read the recipe ({error.strerror}).") from error
    except ValueError as error:
        raise CalibrationError(f"{path}: not a TOML file ({error}).") from error
    return _recipe(path, table)


def _recipe(path: Path, table: dict[str, Any]) -> Recipe:
    unknown = set(table) - {"calibration", "linear", "kv_cache", "override"}
    if unknown:
        raise CalibrationError(
            f"{path}: unknown table [{sorted(unknown)[0]}]; "
            "expected [calibration], [linear], [kv_cache] or [[override]]."
        )
    for key, kind in (
        ("calibration", dict),
        ("linear", dict),
        ("kv_cache", dict),
        ("override", list),
    ):
        if not isinstance(table.get(key, kind()), kind):
            form = f"[{key}]" if kind is dict else f"[[{key}]]"
            raise CalibrationError(f"{path}: {key} = {table[key]!r}; expected a table {form}.")
    sampling = table.get("calibration", {})
    kv_dtype = table.get("kv_cache", {}).get("dtype", "int8")
    if kv_dtype not in KV_DTYPES:
        raise CalibrationError(
            f"{path}: [kv_cache] dtype = {kv_dtype!r}; expected one of {', '.join(KV_DTYPES)}."
        )
    inputs = sampling.get("inputs", CALIBRATION_INPUTS[0])
    if inputs not in CALIBRATION_INPUTS:
        raise CalibrationError(
            f"{path}: [calibration] inputs = {inputs!r}; "
            f"expected one of {', '.join(CALIBRATION_INPUTS)}."
        )
    overrides = []
    for entry in table.get("override", []):
        rest = dict(entry) if isinstance(entry, dict) else {}
        pattern = rest.pop("layers", None)
        if not isinstance(pattern, str):
            raise CalibrationError(f'{path}: an [[override]] needs layers = "<name or wildcard>".')
        overrides.append((pattern, _scheme(path, rest)))
    counts = {}
    for key, default in (("samples", 64), ("max_tokens", 1024)):
        counts[key] = sampling.get(key, default)
        if not isinstance(counts[key], int) or counts[key] < 1:
            raise CalibrationError(
                f"{path}: [calibration] {key} = {counts[key]!r}; expected a number of at least 1."
            )
    return Recipe(
        name=path.stem,
        linear=_scheme(path, table.get("linear", {"scheme": "w8a8"})),
        overrides=tuple(overrides),
        kv_dtype=kv_dtype,
        inputs=inputs,
        **counts,
    )


def _scheme(path: Path, fields: dict[str, Any]) -> Scheme:
    fields = dict(fields)
    name = fields.pop("scheme", None)
    if name not in SCHEMES:
        raise CalibrationError(
            f"{path}: scheme = {name!r}; expected one of {', '.join(sorted(SCHEMES))}."
        )
    try:
        scheme = SCHEMES[name](**fields)
    except TypeError as error:
        raise CalibrationError(f"{path}: scheme {name} does not take {sorted(fields)}.") from error
    if isinstance(scheme, W8A8) and not 0 <= scheme.smoothing <= 1:
        raise CalibrationError(f"{path}: smoothing = {scheme.smoothing}; expected 0 to 1.")
    return scheme


def _scheme_json(scheme: Scheme) -> dict[str, Any]:
    name = next(name for name, kind in SCHEMES.items() if isinstance(scheme, kind))
    return {"scheme": name, **asdict(scheme)}
