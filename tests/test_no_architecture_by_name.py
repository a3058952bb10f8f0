"""No architecture is named in the package: what a model is made of is discovered."""

from __future__ import annotations

import re
from pathlib import Path

import glmcompile
from benchmarks.architectures import types

# A program and a project of these names, which are no model types there.
OTHERS = ('"git"', "llama.cpp")


def test_no_model_type_stands_as_a_word_in_the_package() -> None:
    names = "|".join(re.escape(name) for name in types())
    word = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
    package = Path(glmcompile.__file__).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for other in OTHERS:
                line = line.replace(other, "")
            found += [f"{file.name}:{number}: {name}" for name in word.findall(line)]
    assert found == []
