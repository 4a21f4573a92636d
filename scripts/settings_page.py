"""Write the tables of docs/settings.md from the settings themselves: names, defaults, values, what they do.

python scripts/settings_page.py
They stand between `<!-- settings -->` and `<!-- /settings -->`; a test checks that the page is up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nybble.config import RunConfig
from nybble.settings import Section

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def sections() -> Iterator[tuple[str, type[Section]]]:
    """The sections of a run's settings by name; first, without a name, what stands outside of them."""
    yield "", RunConfig
    for name, field in RunConfig.model_fields.items():
        if _is_section(field):
            yield name, field.annotation


def table(section: str, cls: type[Section]) -> list[str]:
    lines = ["| setting | default, others | |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        if not _is_section(field):
            full_name = f"{section}.{name}" if section else name
            lines.append(f"| `{full_name}` | {_values(field)} | {field.description} |")
    return lines


def tables() -> str:
    parts = []
    for name, cls in sections():
        heading = [f"## {name}", ""] if name else []
        parts.append("\n".join([*heading, *table(name, cls)]))
    return "\n\n".join(parts)


def updated(text: str) -> str:
    """`text` with the settings as they are now."""
    made = f"<!-- settings -->\n{tables()}\n<!-- /settings -->"
    return re.sub("<!-- settings -->.*<!-- /settings -->", lambda _: made, text, flags=re.DOTALL)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _values(field: FieldInfo) -> str:
    """The default, then the other values where they have names."""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    others = [f"`{value}`" for value in _named_values(field.annotation) if value != default]
    return ", ".join(["none" if default is None else f"`{_written(default)}`", *others])


def _named_values(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _named_values(part)]


def _written(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
