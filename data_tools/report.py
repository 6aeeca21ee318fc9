"""What a build did, as one table: what was read, what nobody read, what was rejected and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_tools.writer import ShardPart
from genrecal_ds.console.text import printable

# Sections of the counts: keys of items and formats of pictures, by the number of samples.
SECTIONS = ("read", "unread", "blank", "converted")


@dataclass
class BuildReport:
    """The accepted samples with their keys, and the rejected samples by reason."""

    num_accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejects: dict[str, dict[str, Any]] = field(default_factory=dict)  # by reason
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # by section

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def reject_rate(self) -> float:
        return self.num_rejected / max(1, self.num_rejected + self.num_accepted)

    def add(self, part: ShardPart) -> None:
        """Count one shard."""
        self.num_accepted += len(part.records)
        for reject in part.rejects:
            self.rejected[reject["reason"]] += 1
            self.first_rejects.setdefault(reject["reason"], reject)
        for section, counts in part.counts.items():
            self.counts.setdefault(section, Counter()).update(counts)

    def stated(self) -> dict[str, dict[str, int]]:
        """The counts as the manifest states them."""
        sections = [name for name in SECTIONS if self.counts.get(name)]
        return {name: dict(sorted(self.counts[name].items())) for name in sections}

    def lines(self) -> Iterator[str]:
        """The closing table: section, key or reason, number of samples."""
        for section in SECTIONS:
            counts = self.counts.get(section, Counter())
            for key, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
                yield f"  {section:<10}{printable(key):<32} {count:>10,}"
        for reason, count in self.rejected.most_common():
            first = self.first_rejects[reason]
            place = f"{first['source_id']!r}" if first["source_id"] else f"row {first['row']}"
            example = printable(f"first {place}: {first['detail']}")
            yield f"  {'rejected':<10}{reason:<32} {count:>10,}  {example:.160}"
