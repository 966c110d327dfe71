"""Steps of parameters and state in files, with a quarter of the memory that they take, beside the disk's own speed.

    python benchmarks/bench_storage.py            # print the table
    python benchmarks/bench_storage.py --write    # and put it into docs/storage.md

Each line is a process of its own, whose memory, page cache included, is limited by a control group (Linux; both
versions, where the one of this process can be divided). Where that cannot be done the table says so: then run it with a
limit from outside, as in ``systemd-run --user --scope -p MemoryMax=512M python benchmarks/bench_storage.py --limited``.
Steps and the disk take turns. "The disk" is a program that does nothing else: it reads all that a step reads and writes
all that it writes, through the same files, in the same order, by ``preadv`` and ``pwrite``.

`python -m pytest benchmarks` runs it for a moment. All results are compared with those of an optimizer in memory.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pages import fill, markdown

sys.path.pop(0)

PAGE = Path(__file__).parent.parent / "docs" / "storage.md"
MIB = 1 << 20
PART = MIB  # bytes that "the disk" reads and writes at a time
PERIOD = 1 << 19  # elements after which gradients repeat: a multiple of those of a part

# What is measured: options, bytes that each parameter takes in all files, and whether memory is limited.
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "serial": ({"kernel": "serial"}, 12, True),
    "parallel": ({"kernel": "parallel"}, 12, True),
    "serial, momentum": ({"kernel": "serial", "momentum": 0.9}, 16, True),
    "serial, clip_norm": ({"kernel": "serial", "clip_norm": 1.0}, 12, True),
    "serial, bfloat16": ({"kernel": "serial", "cache_dtype": "bfloat16"}, 10, True),
    "serial, no memory limit": ({"kernel": "serial"}, 12, False),
}


# The child.


def child(case: str, size: int, rounds: int, folder: str, group: str) -> None:
    """Join the control group, train, and print the results as JSON."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    import numpy as np  # only now, to be counted

    from fastrms import RMSProp

    options = CASES[case][0]
    period = np.linspace(-1, 1, PERIOD, dtype=np.float32)
    oracle = RMSProp(np.ones(PERIOD, np.float32), **{**options, "clip_norm": None})
    path = Path(folder, "run")
    start = time.perf_counter()
    opt = RMSProp(np.broadcast_to(np.float32(1), size), storage=path, **options)
    made = time.perf_counter() - start
    grads = opt.buffers["grads"].flat
    for part, values in repeated(opt, grads, period):
        part[...] = values
    norm = np.sqrt(np.sum(np.square(grads[:PERIOD], dtype=float)) * size / PERIOD)  # for the oracle, roughly
    steps, disk = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        opt.step()
        steps.append(time.perf_counter() - start)
        if "clip_norm" not in options:
            oracle.step(period)
        start = time.perf_counter()
        moved = read_and_write(path, list(opt.buffers), 1 + ("clip_norm" in options))
        disk.append(time.perf_counter() - start)
    if "clip_norm" in options:  # whose factor depends on the size: compare the parts with one another
        assert norm > options["clip_norm"]
        oracle.params[...] = opt.params[:PERIOD]
        oracle.cache[...] = opt.cache[:PERIOD]
    same = all(
        part.tobytes() == expected.tobytes()
        for name in ("params", "cache")
        for part, expected in repeated(opt, opt.buffers[name].flat, oracle.buffers[name].flat)
    )
    nbytes = sum(buffer.nbytes for buffer in opt.buffers.values())
    start = time.perf_counter()
    opt.close()
    closed = time.perf_counter() - start
    print(json.dumps({"same": same, "steps": steps, "disk": disk, "moved": moved, "made": made, "closed": closed,
                      "nbytes": nbytes, "resident": resident()}))  # fmt: skip


def repeated(opt: Any, flat: Any, period: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a flat array in files, each with the part of the period that belongs there."""
    for part in opt.backend.parts(flat):
        low = part.start % PERIOD
        yield flat[part], period[low : low + part.stop - part.start]


def read_and_write(path: Path, names: list[str], readings_of_grads: int) -> int:
    """Read and write all that a step reads and writes, and return the number of bytes."""
    files = {name: os.open(path / f"{name}.bin", os.O_RDWR) for name in names}
    size = {name: os.fstat(file).st_size for name, file in files.items()}
    room, moved = memoryview(bytearray(PART)), 0
    try:
        for reading in range(readings_of_grads):
            for offset in range(0, max(size.values()), PART):
                for name, file in files.items():
                    if reading < readings_of_grads - 1 and name != "grads":
                        continue
                    own = offset * size[name] // max(size.values())  # 16-bit state has half as much
                    length = min(PART * size[name] // max(size.values()), size[name] - own)
                    moved += os.preadv(file, [room[:length]], own)
                    if name != "grads":
                        moved += os.pwrite(file, room[:length], own)
    finally:
        for file in files.values():
            os.close(file)
    return moved


def resident() -> int | None:
    """The most bytes of this process that were in memory at once."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


# The parent.


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[str]:
    """A control group of `nbytes` of memory below the group of this process; "" if it cannot be made."""
    found = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, own = line.split(":", 2)
            v1 = "memory" in controllers.split(",")
            if not v1 and controllers:
                continue
            group = Path("/sys/fs/cgroup", *(["memory"] if v1 else []), own.lstrip("/"), f"fastrms-{os.getpid()}")
            with contextlib.suppress(OSError):
                group.mkdir()
                try:
                    # Opened for writing, not made: in a group without that controller there is no such file.
                    with (group / ("memory.limit_in_bytes" if v1 else "memory.max")).open("r+") as stream:
                        stream.write(str(nbytes))
                except OSError:
                    group.rmdir()
                    raise
                found = str(group)
                break
    try:
        yield found
    finally:
        if found:
            os.rmdir(found)


def measure(case: str, limit: int, rounds: int, folder: Path | None, outside: bool) -> dict[str, Any]:
    """The results of the child, and its limit of memory, if any."""
    _, each, wants_limit = CASES[case]
    size = (4 * limit // each) // PERIOD * PERIOD
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        with limited(limit) if wants_limit and not outside else contextlib.nullcontext("") as group:
            command = [sys.executable, __file__, "--child", case, str(size), str(rounds), str(place), group]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{case}: exit status {done.returncode}\n{done.stderr}")
    finally:
        shutil.rmtree(place)
    return json.loads(done.stdout) | {"limit": limit if group or (outside and wants_limit) else None, "size": size}


HEADER = ["float32", "files", "memory limit", "step", "the disk", "step moves", "disk time / step time", "peak memory"]


def row(case: str, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    step, disk = (statistics.median(found[name]) for name in ("steps", "disk"))
    ranges = [f"{value:.2f} s ({min(times):.2f} to {max(times):.2f})" for value, times in
              ((step, found["steps"]), (disk, found["disk"]))]  # fmt: skip
    return [
        case,
        f"{found['nbytes'] / MIB:,.0f} MiB",
        "none" if found["limit"] is None else f"{found['limit'] / MIB:,.0f} MiB",
        *ranges,
        f"{found['moved'] / step / 1e9:.2f} GB/s",
        f"{disk / step:.2f}×",
        "–" if found["resident"] is None else f"{found['resident'] / MIB:,.0f} MiB",
    ]


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/storage.md")
    parser.add_argument("--limit", type=int, default=512, help="MiB of memory; files take four times that (512)")
    parser.add_argument("--rounds", type=int, default=7, help="steps, of each case (default: 7)")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: that of temporary files)")
    parser.add_argument("--limited", action="store_true", help="this process has the limit already")
    args = parser.parse_args()
    import fastrms.bench.machine as about

    rows = []
    for case in CASES:
        rows.append(row(case, measure(case, args.limit * MIB, args.rounds, args.folder, args.limited)))
        print(" | ".join(rows[-1]), flush=True)
    folder = args.folder or Path(tempfile.gettempdir())
    where = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False).stdout
    table = (
        f"Measured on {datetime.now(UTC).date()} on {about.processor()}, {about.processors()} processors, file system "
        f"{where.strip() or 'unknown'}, {args.rounds} steps each: median (minimum to maximum).\n\n"
        + markdown(HEADER, rows)
    )
    print(f"\n{table}")
    if args.write:
        fill([PAGE], {"storage": table})
    return 0


@pytest.mark.parametrize("case", CASES)
def test_storage(case, tmp_path, capsys):
    found = measure(case, 20 * MIB, 3, tmp_path, True)
    assert found["same"]
    assert list(tmp_path.iterdir()) == []
    with capsys.disabled():
        print("\n" + " | ".join(row(case, found | {"limit": None})))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    else:
        sys.exit(main())
