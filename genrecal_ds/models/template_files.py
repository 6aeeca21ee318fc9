"""Finds a folder's chat template, and makes it write the same text on every day."""

import json
import re
from datetime import date
from pathlib import Path

from genrecal_ds.errors import UserError

# What a template that writes today's date gets instead, or no run could be repeated a day later.
# It is the date that Llama 3.1's own template takes.
TODAY = date(2024, 7, 26)
DATES = "genrecal_dates"  # the variable that holds them


def read_template(folder: Path) -> str | None:
    """Return a folder's template: the processor's before the tokenizer's; None without one.

    Raises UserError for named templates of which none is the default.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    named = {path.stem for path in (folder / "additional_chat_templates").glob("*.jinja")}
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = said.get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict):
            named |= found.keys()
            found = found.get("default")
        if found:
            return str(found)
    if named:
        raise UserError(
            f"{folder}: chat templates named {', '.join(sorted(named))} and none is the default; "
            "copy one of them to chat_template.jinja"
        )
    return None


def with_fixed_date(source: str) -> tuple[str, dict[str, str]]:
    """(the template with strftime_now replaced by a table in DATES, the table by format)."""
    formats = re.findall(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""", source)
    dates = {a or b: TODAY.strftime(a or b) for a, b in formats}
    if not dates:
        return source, {}
    macro = f"{{% macro strftime_now(format) %}}{{{{ {DATES}[format] }}}}{{% endmacro %}}"
    return macro + "{{ '' }}" + source, dates  # a line break behind a block would be trimmed
