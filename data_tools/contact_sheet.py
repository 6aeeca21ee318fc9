"""Writes one HTML page of samples: pictures beside their turns."""

from collections.abc import Iterable

from genrecal_ds.console.page import html_page, picture
from genrecal_ds.console.text import printable_lines
from genrecal_ds.data.reader import BadSample, Sample

THUMBNAIL = 256  # pixels of the longer side

_STYLE = """
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em }
p { white-space: pre-wrap }
.assistant { color: #0550ae } .system { color: #57606a } .bad { color: #d1242f }
"""
_BODY = """<main>
{% for card in cards %}<article><small>{{ card.head }}</small>
{% for address in card.pictures %}<img alt="" src="{{ address }}">{% endfor %}
{% for role, text in card.turns %}<p class="{{ role }}">{{ text }}</p>
{% endfor %}{% if card.answers %}<small>answers: {{ card.answers }}</small>{% endif %}
</article>
{% endfor %}</main>
"""


def contact_sheet(title: str, samples: Iterable[tuple[int, Sample | BadSample]]) -> str:
    """Make the page of numbered samples; a bad sample shows its reason instead of its content."""
    cards = [_card(number, sample) for number, sample in samples]
    return html_page(printable_lines(title), _BODY, _STYLE, cards=cards)


def _card(number: int, sample: Sample | BadSample) -> dict[str, object]:
    if isinstance(sample, BadSample):
        reason = [("bad", printable_lines(str(sample)))]
        return {"head": f"{number}", "pictures": [], "turns": reason, "answers": ""}
    turns = [
        (
            message["role"] if message.get("taught", True) else "context",
            printable_lines(" ".join(_text(part) for part in message["content"])),
        )
        for message in sample.messages
    ]
    return {
        "head": printable_lines(f"{number} {sample.key} {sample.kind}"),
        "pictures": [picture(image, THUMBNAIL) for image in sample.images],
        "turns": turns,
        "answers": printable_lines(", ".join(sample.answers)),
    }


def _text(part: dict[str, str]) -> str:
    return part["text"] if part["type"] == "text" else "[image]"
