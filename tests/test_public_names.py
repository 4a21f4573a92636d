"""The names of `import nybble`: all there, the same for type checkers, and none imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nybble


def _names_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(nybble.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    return {
        alias.name: str(node.module)
        for node in imports
        for alias in node.names
        if str(node.module).startswith("nybble")
    }


def test_every_name_resolves_to_what_type_checkers_see() -> None:
    names = _names_for_type_checkers()
    assert names
    for name, module in names.items():
        assert getattr(nybble, name) is getattr(sys.modules[module], name)
    assert set(names) <= set(dir(nybble))
    assert len(names) == len(nybble._HOME)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lora'"):
        _ = nybble.lora


def test_help_does_not_import_torch() -> None:
    code = "import sys, nybble, nybble.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
