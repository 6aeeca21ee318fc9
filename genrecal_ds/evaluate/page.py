"""Writes one page of several exports' answers side by side, with pictures, errors first.

    python -m genrecal_ds.evaluate.page SHARDS RESULT.json [RESULT.json ...] --out page.html

The results come from genrecal_ds.evaluate on the same shards. Samples that the last model has wrong
come first, and among them those that another model has right.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.console.page import html_page, picture
from genrecal_ds.console.text import printable, printable_lines
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError

THUMBNAIL = 320  # pixels of the longer side

_STYLE = """
article { margin: 1em 0; display: flex; gap: 1em } p { white-space: pre-wrap }
img { max-width: 320px } article td { border: 0 }
"""
_BODY = """<table><tr><th>result<th>score<th>95 %<th>n</tr>
{% for name, score in results %}<tr><td>{{ name }}<td>{{ "%.3f"|format(score.score) }}
<td>{{ "%.3f"|format(score.low) }} to {{ "%.3f"|format(score.high) }}<td>{{ score.n }}</tr>
{% endfor %}</table>
<p><small>{{ cards|length }} of {{ total }} samples: the last result's errors first.</small></p>
{% for card in cards %}<article><div>
{% for address in card.pictures %}<img alt="" src="{{ address }}">{% endfor %}
</div><div><small>{{ card.head }}</small><p>{{ card.question }}</p>
<p>gold: {{ card.gold }}</p><table>
{% for name, answer, word, score in card.answers %}<tr class="{{ word }}"><td>{{ name }}
<td>{{ answer }}<td>{{ "%.2f"|format(score) }}</tr>
{% endfor %}</table></div></article>
{% endfor %}
"""


def page(shards: Path, results: Sequence[Path], most: int) -> str:
    """Make the page. Raises UserError for a result of other shards or without predictions."""
    reader = ShardReader(ShardIndex.load(shards))
    read = [_read(path, reader.index.fingerprint) for path in results]
    names = _names(results)
    length = min(len(lines) for _, lines in read)
    rows = [[lines[number] for _, lines in read] for number in range(length)]
    order = sorted(range(length), key=lambda number: _rank([row["score"] for row in rows[number]]))
    cards = [_card(reader, number, names, rows[number]) for number in order[:most]]
    scores = [result["scores"]["overall"] for result, _ in read]
    return html_page(
        "Answers", _BODY, _STYLE, cards=cards, total=length,
        results=list(zip(names, scores, strict=True)),
    )  # fmt: skip


def _rank(scores: list[float]) -> tuple[float, float]:
    """Sort the last model's errors first, and among them those that most others have right."""
    return scores[-1], -sum(scores[:-1])


def _names(results: Sequence[Path]) -> list[str]:
    """Name the results by their files, or by their paths where names are equal."""
    names = [path.stem for path in results]
    return names if len(set(names)) == len(names) else [str(path) for path in results]


def _read(path: Path, fingerprint: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    predictions = path.with_suffix(".predictions.jsonl")
    for file in (path, predictions):
        if not file.is_file():
            raise UserError(f"{file}: no such file; name a result of genrecal_ds.evaluate")
    result = json.loads(path.read_text())
    if result.get("data") != fingerprint:
        raise UserError(f"{path}: its answers are to other shards; evaluate on these")
    return result, [json.loads(line) for line in predictions.read_text().splitlines()]


def _card(
    reader: ShardReader, number: int, names: Sequence[str], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    first = rows[0]
    words = {1: "right", 0: "wrong"}
    return {
        "head": printable(f"{first['key']} {first['kind']}"),
        "pictures": [picture(image, THUMBNAIL) for image in reader.read(number).images],
        "question": printable_lines(first["question"]),
        "gold": printable_lines(", ".join(dict.fromkeys(first["answers"]))),
        "answers": [
            (
                name,
                printable_lines(row["prediction"]),
                words.get(row["score"], "partly"),
                row["score"],
            )
            for name, row in zip(names, rows, strict=True)
        ],
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.evaluate.page", __doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=200, help="samples on the page")
    arguments = parser.parse_args(argv)
    text = page(arguments.shards, arguments.results, arguments.most)
    arguments.out.write_text(text)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
