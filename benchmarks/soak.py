"""Train for as long as is wanted while everything happens that can happen in a long run; then compare bit for bit.

    python benchmarks/soak.py --minutes 20          # the figures in docs/promises.md
    python benchmarks/soak.py --minutes 1 --seed 7

Three optimizers train at once, in steps of random size, on all kernels: one with the reference's options beside the
reference class itself, one with many options and groups and one with 16-bit state, each beside a twin that runs the
NumPy kernel and to which nothing ever happens. To the three, things happen: they are saved and loaded, made anew from
their file, pickled, copied, stepped in children after fork and by threads; options, kernels and threads change;
gradients come as lists, in the buffer, in another order, with None, with inf and NaN. All bytes are compared after each
round.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import gc
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastrms import NonfiniteError, RMSProp
from fastrms.kernels.reference import ReferenceRMSProp

SHAPES = {"W": (300, 256), "b": (256,), "small": (7, 3), "scale": (), "none": (0, 4)}
STEPS_OF_A_ROUND = 30


class Subject:
    """An optimizer to which things happen, and its twin, to which nothing happens.

    `dtypes` are of the parameters, in turn. With `groups`, the parameters are in two groups.
    """

    def __init__(self, name: str, dtypes: list[Any], options: dict[str, Any], groups: bool) -> None:
        self.name = name
        self.rng = np.random.default_rng(len(name))
        self.dtypes = {key: dtypes[k % len(dtypes)] for k, key in enumerate(SHAPES)}
        start = self.draw()
        self.keys = [("W", "b", "none"), ("small", "scale")] if groups else [tuple(SHAPES)]
        params = [{"params": {key: start[key] for key in keys}} for keys in self.keys] if groups else start
        self.opt = RMSProp(params, nonfinite="skip", **options)
        self.grouped = groups
        self.plain_options = not options
        self.oracle: Any
        if self.plain_options:
            self.oracle = [ReferenceRMSProp([start[key] for key in keys]) for keys in self.keys]
        else:
            self.oracle = RMSProp(params, kernel="numpy", **options)

    def draw(self) -> dict[str, Any]:
        """One array for each parameter."""
        return {
            key: np.asarray(self.rng.standard_normal(shape)).astype(self.dtypes[key]) for key, shape in SHAPES.items()
        }

    def arranged(self, arrays: dict[str, Any]) -> Any:
        """Arrays as `step` takes them: by group, if there are groups."""
        return [{key: arrays[key] for key in keys} for keys in self.keys] if self.grouped else arrays

    def step_oracle(self, gradients: dict[str, Any]) -> None:
        """Take the same step with the twin."""
        if not self.plain_options:
            self.oracle.step(self.arranged(gradients))
            return
        for reference, keys in zip(self.oracle, self.keys, strict=True):
            there = [k for k, key in enumerate(keys) if gradients[key] is not None]
            # The reference class takes no None: take a step with the other gradients.
            part = copy.copy(reference)
            part.params, part.cache = ([of[k] for k in there] for of in (reference.params, reference.cache))
            part.step([gradients[keys[k]] for k in there])
            for k, param, cache in zip(there, part.params, part.cache, strict=True):
                reference.params[k], reference.cache[k] = np.asarray(param), np.asarray(cache)

    def set_option(self, group: int, name: str, value: float) -> None:
        """Set an option of the optimizer and of its twin."""
        self.opt.param_groups[group][name] = value
        if self.plain_options:
            setattr(self.oracle[group], name, value)
        else:
            self.oracle.param_groups[group][name] = value

    def differences(self) -> list[str]:
        """What is not the same, bit for bit."""
        if not self.plain_options:
            return [
                name
                for name, buffer in self.oracle.buffers.items()
                if name != "grads" and buffer.block.tobytes() != self.opt.buffers[name].block.tobytes()
            ]
        found = []
        views = self.opt.params if self.grouped else [self.opt.params]
        caches = self.opt.cache if self.grouped else [self.opt.cache]
        for reference, keys, params, cache in zip(self.oracle, self.keys, views, caches, strict=True):
            for k, key in enumerate(keys):
                if params[key].tobytes() != reference.params[k].tobytes():
                    found.append(f"params[{key!r}]")
                if cache[key].tobytes() != reference.cache[k].tobytes():
                    found.append(f"cache[{key!r}]")
        return found


class Soak:
    """What happens, how often, and with what result; checkpoints are in `folder`."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        many = {
            "momentum": 0.9, "nesterov": True, "centered": True, "weight_decay": 0.01, "bias_correction": True,
            "clip_norm": 5.0, "global_clip_norm": 8.0,
        }  # fmt: skip
        self.subjects = [
            Subject("reference", [np.float32, np.float64], {}, groups=True),
            Subject("options", [np.float64, np.float32], many, groups=True),
            Subject("bfloat16", [np.float32], {"cache_dtype": "bfloat16", "momentum": 0.9}, groups=False),
        ]
        self.happenings = [
            self.save_and_load, self.from_checkpoint, self.pickled, self.copied, self.in_a_child, self.by_threads,
            self.options, self.kernel, self.spoilt, self.raised, self.state,
        ]  # fmt: skip

    def round(self) -> None:
        """Some steps of each optimizer, with things that happen between them; then compare."""
        for subject in self.subjects:
            for _ in range(STEPS_OF_A_ROUND):
                self.step(subject)
                if self.random.random() < 0.2:
                    happening = self.random.choice(self.happenings)
                    happening(subject)
                    self.counts[happening.__name__] += 1
            self.counts["comparisons"] += 1
            if found := subject.differences() + subject.opt.check():
                self.wrong.append(f"{subject.name}: {', '.join(found)}")

    def step(self, subject: Subject) -> None:
        """Take a step with new gradients, with the optimizer and with its twin."""
        gradients: dict[str, Any] = subject.draw()
        way = self.random.choice(["list", "buffer", "order", "none"])
        if way == "none":
            gradients[self.random.choice(list(SHAPES))] = None
        if way == "buffer":
            subject.opt.buffers["grads"].gather(subject.arranged(gradients))
            subject.opt.step()
        elif way == "order":
            subject.opt.step(subject.arranged({key: g.copy("F") for key, g in gradients.items()}))
        else:
            subject.opt.step(subject.arranged(gradients))
        subject.step_oracle(gradients)
        self.counts["steps"] += 1

    def path(self) -> Path:
        """A file of one of the two kinds."""
        return self.folder / self.random.choice(["state.npz", "state.safetensors"])

    def save_and_load(self, subject: Subject) -> None:
        """Save, take a step, and take it back."""
        path = self.path()
        subject.opt.save(path)
        subject.opt.step(subject.arranged(subject.draw()))  # which loading takes back
        subject.opt.load(path)

    def from_checkpoint(self, subject: Subject) -> None:
        """Go on with an optimizer made from a file alone."""
        path = self.path()
        subject.opt.save(path)
        subject.opt = RMSProp.from_checkpoint(path)

    def pickled(self, subject: Subject) -> None:
        """Go on with one that was pickled."""
        subject.opt = pickle.loads(pickle.dumps(subject.opt))

    def copied(self, subject: Subject) -> None:
        """Go on with a copy."""
        subject.opt = copy.deepcopy(subject.opt)

    def state(self, subject: Subject) -> None:
        """Like `save_and_load`, in memory."""
        state = subject.opt.state_dict()
        subject.opt.step(subject.arranged(subject.draw()))
        subject.opt.load_state_dict(state)

    def in_a_child(self, subject: Subject) -> None:
        """Take three steps in a child after fork, which compares for itself."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(3):
                    self.step(subject)
                status = 1 if subject.differences() else 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            self.wrong.append(f"{subject.name}: a child of fork")

    def by_threads(self, subject: Subject) -> None:
        """Four threads share the optimizer; all steps are alike, so that their order does not matter."""
        gradients = subject.draw()
        threads = [threading.Thread(target=subject.opt.step, args=(subject.arranged(gradients),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in threads:
            subject.step_oracle(gradients)
        self.counts["steps"] += len(threads)

    def options(self, subject: Subject) -> None:
        """Set an option of a group to another value."""
        group = self.random.randrange(len(subject.keys))
        name = self.random.choice(["lr", "decay_rate", "epsilon"])
        value = {"lr": 10 ** self.random.uniform(-5, -2), "decay_rate": self.random.uniform(0.5, 0.99),
                 "epsilon": 10 ** self.random.uniform(-10, -3)}[name]  # fmt: skip
        subject.set_option(group, name, value)

    def kernel(self, subject: Subject) -> None:
        """Choose another kernel, and how many threads it has."""
        subject.opt.kernel = self.random.choice(["auto", "numpy", "serial", "parallel"])
        subject.opt.num_threads = self.random.choice([None, 1])

    def bad(self, subject: Subject) -> dict[str, Any]:
        """Gradients of which one value is not finite."""
        gradients = subject.draw()
        key = self.random.choice([key for key in SHAPES if gradients[key].size])
        gradients[key].reshape(-1)[self.random.randrange(gradients[key].size)] = self.random.choice([np.nan, np.inf])
        return gradients

    def spoilt(self, subject: Subject) -> None:
        """Give gradients that are not finite, to be skipped."""
        before = subject.opt.skipped_steps
        subject.opt.step(subject.arranged(self.bad(subject)))
        if subject.opt.skipped_steps != before + 1:
            self.wrong.append(f"{subject.name}: a step that was to be skipped")

    def raised(self, subject: Subject) -> None:
        """Give gradients that are not finite, to be refused."""
        subject.opt.nonfinite = "raise"
        try:
            subject.opt.step(subject.arranged(self.bad(subject)))
        except NonfiniteError:
            pass
        else:
            self.wrong.append(f"{subject.name}: a step that was to raise")
        subject.opt.nonfinite = "skip"


def resident() -> tuple[float, int]:
    """Give free memory back to the system; then return the memory of this process in MB, and its open files."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as stream:
        pages = int(stream.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))


def main(argv: list[str] | None = None) -> int:
    """Run for the time that was asked for; exit status 1 if any bit differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when (default: 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(args.seed, Path(folder))
        start = time.monotonic()
        warm = None
        while not soak.wrong and (warm is None or time.monotonic() - start < 60 * args.minutes):
            soak.round()
            # Everything has been compiled and has had its memory after a tenth of the time.
            if warm is None and time.monotonic() - start >= 6 * args.minutes:
                warm = resident()
        minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes, seed {args.seed}")
    for name, count in sorted(soak.counts.items(), key=lambda item: -item[1]):
        print(f"{count:9,} {name.replace('_', ' ')}")
    if warm:
        (before, files_before), (after, files_after) = warm, resident()
        print(f"resident memory {before:.0f} MB after a tenth of the time, {after:.0f} MB at the end; "
              f"open files {files_before}, {files_after}")  # fmt: skip
    print("\n".join(["different bits:", *soak.wrong]) if soak.wrong else "all bits are the same")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
