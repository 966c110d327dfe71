"""What `fastrms bench` shows and writes: tables, JSON and CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrms.bench.in_situ import InSituRow
from fastrms.bench.measure import Row
from fastrms.cli.common import CommandError, from_start, is_plain, make_table, print_table, say
from fastrms.plots import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_rows", "print_training_rows", "write_results"]


def print_rows(console: "Console", title: str, rows: Sequence[Row]) -> None:
    """The table of one case; the machine's limit first, then every way."""
    plain = is_plain(console)
    table = make_table(console, title, "time", "middle half", "Gparam/s", "GB/s", "% of limit", "threads", "checked")
    for row in rows:
        table.add_row(
            row.label,
            format_seconds(row.seconds, plain=plain),
            _spread(row.quarter, row.three_quarters, plain),
            _digits(row.gparam_per_s),
            _digits(row.gbyte_per_s),
            "-" if math.isnan(row.percent_of_limit) else f"{row.percent_of_limit:.0f}",
            str(row.threads),
            row.check,
        )
    say(console)
    print_table(console, table)


def print_training_rows(console: "Console", title: str, rows: Sequence[InSituRow]) -> None:
    """The table of one network."""
    plain = is_plain(console)
    table = make_table(console, title, "gradients", "training step", "middle half", "of which optimizer", "faster")
    for row in rows:
        table.add_row(
            "reference class" if row.kernel == "reference" else f"fastrms {row.kernel}",
            row.gradients,
            format_seconds(row.step_seconds, plain=plain),
            _spread(row.quarter, row.three_quarters, plain),
            format_seconds(row.optimizer_seconds, plain=plain),
            f"{row.times_faster:.2f}x",
        )
    say(console)
    print_table(console, table)


def write_results(
    folder: Path, stem: str, about: Mapping[str, Any], rows: Sequence[Row] | Sequence[InSituRow]
) -> list[Path]:
    """Write ``stem.json`` and ``stem.csv`` and return their paths.

    Raises
    ------
    CommandError
        A file cannot be written.
    """
    records = [dict(vars(row)) for row in rows]
    paths = [folder / f"{stem}.json", folder / f"{stem}.csv"]
    path = paths[0]
    try:
        # JSON has no NaN.
        clean = [{key: None if value != value else value for key, value in record.items()} for record in records]
        from_start(path).write_text(json.dumps({**about, "results": clean}, indent=1) + "\n", encoding="utf-8")
        path = paths[1]
        with from_start(path).open("w", encoding="utf-8", newline="") as stream:
            if records:
                writer = csv.DictWriter(stream, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
    except OSError as error:
        raise CommandError(f"--output: {path}: cannot be written: {error.strerror or error}") from None
    return paths


def _spread(low: float, high: float, plain: bool) -> str:
    return f"{format_seconds(low, plain=plain)} to {format_seconds(high, plain=plain)}"


def _digits(value: float) -> str:
    """Three digits."""
    return f"{value:.3f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
