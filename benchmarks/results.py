"""Files of results: one for each processor and date, in benchmarks/results/, whose README describes them."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from fastrms.bench.in_situ import TrainingRow
from fastrms.bench.machine import Description
from fastrms.bench.measure import StepRow

__all__ = ["FOLDER", "SCHEMA", "Results", "StateRow", "TorchRow", "newest", "read", "save"]

FOLDER = Path(__file__).parent / "results"
SCHEMA = 1


class StateRow(TypedDict):
    """Training with one kind of state: mean and standard deviation of losses and accuracy over seeds."""

    setting: str
    cache: str
    seeds: int
    mean: list[float]
    deviation: list[float]


class TorchRow(TypedDict):
    """One case of bench_torch.py: medians by way, and how many times faster ours is than the better of PyTorch's."""

    case: str
    busy: bool  # next to another program
    one_thread: NotRequired[bool]  # PyTorch uses one thread; older files do not have it
    seconds: dict[str, float]
    ratio: float
    least: float


@dataclass
class Results:
    """What was measured on one machine in one run."""

    date: str  # ISO 8601, UTC
    machine: Description
    quiet: dict[str, object]
    settings: dict[str, object]
    steps: list[StepRow] = field(default_factory=list)
    training: list[TrainingRow] = field(default_factory=list)
    training_with_sleep: list[TrainingRow] = field(default_factory=list)
    state: list[StateRow] = field(default_factory=list)
    torch: list[TorchRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def processor(self) -> str:
        """The name of the processor, as tables show it."""
        name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*", "", self.machine["processor"])
        return f"{' '.join(name.split())} ({self.machine['microarchitecture']})"

    @property
    def quick(self) -> bool:
        """Whether it was a quick run, for trying it out."""
        return bool(self.settings.get("quick"))


def read(path: Path) -> Results:
    """Read a file of results."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("schema", None) != SCHEMA:
        raise SystemExit(f"{path}: expected schema {SCHEMA}")
    return Results(**content)


def save(results: Results, folder: Path = FOLDER) -> Path:
    """Write results to the file of their processor and date; another machine's file of that name stays."""
    stem = re.sub(r"[^a-z0-9]+", "-", f"{results.processor} {results.date[:10]}".lower()).strip("-")
    path, number = folder / f"{stem}.json", 1
    while path.exists() and not same_machine(read(path), results):
        number += 1
        path = folder / f"{stem}-{number}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(results)}, indent=1) + "\n", encoding="utf-8")
    return path


def same_machine(one: Results, other: Results) -> bool:
    """Whether two results are of machines with the same processor, caches and number of processors."""
    keys = ("processor", "microarchitecture", "caches", "processors")
    return all(one.machine[key] == other.machine[key] for key in keys)


def newest(folder: Path = FOLDER) -> list[Results]:
    """The newest results of each machine, the newest first."""
    everything = sorted((read(path) for path in folder.glob("*.json")), key=lambda each: each.date, reverse=True)
    found: list[Results] = []
    for results in everything:
        if not any(same_machine(results, other) for other in found):
            found.append(results)
    return found
