"""Finds the native library with the custom operators of ONNX Runtime's CPU provider."""

from pathlib import Path

from glmcompile.errors import NativeLibraryError

_NAMES = ("glmcompile_native.so", "glmcompile_native.dylib", "glmcompile_native.dll")


def library_path() -> Path:
    """The shared library for `SessionOptions.register_custom_ops_library`.

    Raises:
        NativeLibraryError: the package was installed without its compiled part.
    """
    # An editable install keeps Python files in the source tree and the library in
    # site-packages; the package's search path names both.
    for directory in __path__:
        for name in _NAMES:
            candidate = Path(directory) / name
            if candidate.is_file():
                return candidate
    raise NativeLibraryError(
        f"none of {', '.join(_NAMES)} in {', '.join(map(str, __path__))}: the native library was "
        "not built; reinstall with `pip install --no-build-isolation -e .` (needs CMake, Ninja "
        "and a C++17 compiler) or install a wheel"
    )
