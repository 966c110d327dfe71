"""Tables in Markdown, and the pages of the documentation that they are written to."""

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path

from fastrms.bench import machine

__all__ = ["fill", "markdown", "this_machine"]


def this_machine(*details: str) -> str:
    """A line on the machine of a measurement: processor, details, date and load. Call it before the measurement."""
    processor = f"{machine.processor()} ({machine.microarchitecture()}), {machine.processors()} processors"
    load = f"load average {machine.load() or 0.0:.1f} at the start"
    return f"{'; '.join([processor, *details, str(date.today()), load])}."


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column flush left and numbers flush right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def fill(pages: Sequence[Path], parts: Mapping[str, str], others: Collection[str] = ()) -> list[str]:
    """Write each table between its markers on the pages, and return the names of tables with their pages.

    The tables `others` on the pages stay as they are.
    """
    written = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table: (\S+) -->", text):
            if name in others:
                continue
            if name not in parts:
                raise SystemExit(f"{page}: table: expected one of {', '.join(parts)}, got {name!r}")
            marker = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
            text, found = re.subn(marker, lambda m, n=name: f"{m[1]}\n{parts[n]}\n\n{m[2]}", text, flags=re.DOTALL)
            if not found:
                raise SystemExit(f"{page}: table {name}: expected <!-- end --> after it, found none")
            written.append(f"{name} in {page.name}")
        page.write_text(text, encoding="utf-8")
    return written
