"""One HTML page of samples: pictures with their turns, whatever the data holds.

Everything from the data is escaped by the template engine, the page's policy forbids scripts and
any load from elsewhere, and pictures are re-encoded thumbnails.
"""

import base64
import io
from collections.abc import Iterable

from jinja2 import Environment, StrictUndefined
from PIL import Image

from genrecal_ds.data.reader import BadSample, Sample
from genrecal_ds.text import printable

THUMBNAIL = 256  # pixels of the longer side

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #1f2328; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em; }
article { border: 1px solid #d0d7de; border-radius: 6px; padding: .7em; overflow-wrap: anywhere; }
img { max-width: 100%; } p { margin: .3em 0; white-space: pre-wrap; }
.assistant { color: #0550ae; } .system { color: #57606a; } .bad { color: #d1242f; }
small { color: #57606a; }
</style></head><body>
<h1>{{ title }}</h1>
<main>
{% for card in cards %}<article><small>{{ card.head }}</small>
{% for jpeg in card.pictures %}<img alt="" src="data:image/jpeg;base64,{{ jpeg }}">{% endfor %}
{% for role, text in card.turns %}<p class="{{ role }}">{{ text }}</p>
{% endfor %}{% if card.answers %}<small>answers: {{ card.answers }}</small>{% endif %}
</article>
{% endfor %}</main></body></html>
"""


def contact_sheet(title: str, samples: Iterable[tuple[int, Sample | BadSample]]) -> str:
    """The page for numbered samples; a bad one shows its reason in place of its content."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    cards = [_card(number, sample) for number, sample in samples]
    return environment.from_string(_PAGE).render(title=shown(title), cards=cards)


def shown(text: str) -> str:
    """Line breaks stay; other control and direction characters become visible escapes."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _card(number: int, sample: Sample | BadSample) -> dict[str, object]:
    if isinstance(sample, BadSample):
        return {"head": f"{number}", "pictures": [], "turns": [("bad", shown(str(sample)))],
                "answers": ""}  # fmt: skip
    turns = [
        (message["role"], shown(" ".join(_text(part) for part in message["content"])))
        for message in sample.messages
    ]
    return {
        "head": shown(f"{number} {sample.key} {sample.kind}"),
        "pictures": [_thumbnail(image) for image in sample.images],
        "turns": turns,
        "answers": shown(", ".join(sample.answers)),
    }


def _text(part: dict[str, str]) -> str:
    return part["text"] if part["type"] == "text" else "[image]"


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
