"""docs/models.md's table, written from what the tests of the zoo just showed.

    make models-table

A pytest plugin (tests/conftest.py names it). A cell says yes only where every test of it passed.
"""

import re
from pathlib import Path

import pytest

START, END = "<!-- table:start -->", "<!-- table:end -->"
HEADER = [
    "row", "as teacher", "as student", "sees pictures", "packs", "pixels", "answers found",
    "remote code",
]  # fmt: skip
OWN_CODE = "a folder's own code"  # tests/unit/models/test_remote.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models-table", metavar="FILE", help="write the table of families there")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--models-table"):
        config.pluginmanager.register(Table(Path(config.getoption("--models-table"))))


class Table:
    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[tuple[str, str], list[str]] = {}  # (row, column) -> outcomes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        if "test_listed_code_runs" in report.nodeid:
            for column in ("as teacher", "as student"):
                self.outcomes[OWN_CODE, column] = [report.outcome]
            return
        found = re.search(r"::(test_\w+)\[([\w.]+)(?:-(\w+))?\]$", report.nodeid)
        if not found:
            return
        test, row, detail = found.groups()
        if "pair_learns" in test:
            column = f"as {detail}"
        else:
            columns = {
                "packed_samples": "packs", "see_the_picture": "sees pictures",
                "plain_folder_again": "as student", "batch_equals": "as teacher",
                "cover_the_answer": "answers found",
            }  # fmt: skip
            column = next((c for name, c in columns.items() if name in test), None)
        if column:
            self.outcomes.setdefault((row, column), []).append(report.outcome)

    def pytest_sessionfinish(self) -> None:
        text = self.path.read_text()
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        middle = text.partition(START)[2].partition(END)[0]
        # Rows of another run, in another environment, stay.
        cells = {line.split("|")[1].strip(): line for line in middle.splitlines()[3:]}
        for row in {row for row, _ in self.outcomes}:
            cells[row] = "| " + " | ".join(self._cells(row)) + " |"
        lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
        lines += [cells[row] for row in sorted(cells)]
        self.path.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}")

    def _cells(self, row: str) -> list[str]:
        from genrecal_ds.models.processors import backend
        from tests.zoo import MODEL_TYPES

        cells = [row]
        for column in HEADER[1:]:
            outcomes = self.outcomes.get((row, column), [])
            if column == "pixels":
                cells.append("-" if row == OWN_CODE else backend(MODEL_TYPES.get(row, row)))
            elif column == "remote code":
                cells.append("listed by sha256" if row == OWN_CODE else "no")
            elif "failed" in outcomes or not outcomes:
                cells.append("FAILS" if outcomes else "not run")
            else:
                cells.append("yes" if "passed" in outcomes else "no")
        return cells
