"""Builds HTML pages that load nothing: text escaped, pictures inside, scripts forbidden."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1.5em auto; max-width: 1150px; color: #1f2328 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { border: 1px solid #d0d7de; padding: 3px 9px; text-align: left }
article { border: 1px solid #d0d7de; border-radius: 6px; padding: .7em; overflow-wrap: anywhere }
img { max-width: 100% } p { margin: .3em 0 } small { color: #57606a }
.right { color: #1a7f37 } .wrong { color: #d1242f } .partly { color: #9a6700 }
{{ style }}
</style></head><body>
<h1>{{ title }}</h1>
{{ body }}
</body></html>
"""
# A name that a template asks for and does not get is a mistake, not an empty text.
_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def html_page(title: str, body: str, style: str = "", **values: Any) -> str:
    """Render a page. body and style are trusted templates; title and values are untrusted text."""
    inner = Markup(_ENVIRONMENT.from_string(body).render(values))
    frame = _ENVIRONMENT.from_string(_FRAME)
    return frame.render(title=title, style=Markup(style), body=inner)


def picture(image: Image.Image, longest: int | None = None) -> str:
    """Make a data: address: a PNG, or with `longest` (pixels of the longer side) a JPEG."""
    buffer = io.BytesIO()
    if longest is None:
        image.save(buffer, "PNG")
        return data_address(buffer.getvalue(), "png")
    small = image.copy()
    small.thumbnail((longest, longest))
    small.save(buffer, "JPEG", quality=80)
    return data_address(buffer.getvalue(), "jpeg")


def picture_file(png: Path) -> str:
    return data_address(png.read_bytes(), "png")


def data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
