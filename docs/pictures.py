"""Draw the pictures of the documentation, each from a real run of fastrms; the docs build calls this.

    python docs/pictures.py [FOLDER [NAME ...]]      # default: all of them, in docs/_pictures

A picture is a function here that returns a figure; its file has the function's name. All runs are seeded. Colours are
of the Okabe-Ito palette, which colour-blind people can tell apart, and dashes do the same in grey.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from fastrms import RMSProp
from fastrms.demo.mlp import evaluate, init_params, loss_and_gradients
from fastrms.plots import plot_throughput

__all__ = ["PICTURES", "draw_all"]

HERE = Path(__file__).parent

# For lines in order: colour and dashes. From dark to light, so that grey keeps the order.
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "solid"},
    {"color": "#0072B2", "linestyle": (0, (5, 1.5))},
    {"color": "#D55E00", "linestyle": (0, (2, 1))},
    {"color": "#E69F00", "linestyle": (0, (1, 1))},
]


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9 if panels == 2 else 7, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.title.set_fontsize(10)
        one.grid(color="#EEEEEE", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y


def _train(lr: float, batch: int, epochs: int, seed: int = 0) -> tuple[RMSProp, list[float]]:
    """Train a perceptron 64-32-10 on the digits; return the optimizer and the loss of each step."""
    x, y = _digits()
    rng = np.random.default_rng(seed)
    opt = RMSProp(init_params([64, 32, 10], np.float32, rng), lr=lr)
    losses = []
    for _ in range(epochs):
        order = rng.permutation(len(y))
        for start in range(0, len(y) - batch + 1, batch):
            rows = order[start : start + batch]
            loss, _ = loss_and_gradients(opt.params, x[rows], y[rows], out=opt.grads)
            opt.step()
            losses.append(float(loss))
    return opt, losses


def _memory(title: str, gaps: bool) -> Figure:
    """Draw the arrays of a small network as they follow one another in memory, with gaps or without."""
    figure, (axes,) = _figure(1, title)
    figure.set_size_inches(4.8, 2.8)
    opt = RMSProp({"W1": np.zeros((5, 3)), "b1": np.zeros(4), "W2": np.zeros((3, 3)), "b2": np.zeros(4)})
    buffers = {"parameters": opt.params, "gradients": opt.grads, "mean squares": opt.cache}
    colours = {"W1": "#56B4E9", "b1": "#E69F00", "W2": "#009E73", "b2": "#D55E00"}
    shifts = gaps * np.random.default_rng(4).integers(1, 4, (len(buffers), len(colours))).cumsum(axis=1)
    arrow = {"arrowstyle": "-|>", "color": "#000000", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    stop = 0
    for row, (arrays, shift) in enumerate(zip(buffers.values(), shifts, strict=True)):
        first = min(array.ctypes.data for array in arrays.values())
        for (name, colour), apart in zip(colours.items(), shift, strict=True):
            start = (arrays[name].ctypes.data - first) // arrays[name].itemsize + apart
            stop = start + arrays[name].size
            axes.barh(row, stop - start, 0.56, left=start, color=colour, edgecolor="#FFFFFF")
            axes.text((start + stop) / 2, row, name, fontsize=9, ha="center", va="center")
            if gaps:
                axes.annotate("", (stop, row + 0.42), (start, row + 0.42), arrowprops=arrow)
    if not gaps:
        axes.annotate("", (stop, 2.42), (0, 2.42), arrowprops=arrow)
    axes.set_ylim(2.6, -0.4)
    axes.set_xlim(-0.5, 43)
    axes.set_yticks(range(3), buffers)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def separate_arrays() -> Figure:
    """The arrays of a NumPy loop, and an arrow for the passes over each."""
    return _memory("Separate arrays, several passes over each", gaps=True)


def flat_buffers() -> Figure:
    """The same arrays in the buffers of an optimizer, and one arrow for its pass."""
    return _memory("Three flat buffers, one pass over all", gaps=False)


def valley() -> Figure:
    """The paths of gradient descent and of RMSProp in a valley that is 100 times as steep in y as in x."""
    steepness = np.array([1.0, 100.0])
    start = np.array([-2.0, 0.9])
    figure, (axes,) = _figure(1, "50 steps in a valley: f = (x² + 100 y²) / 2")
    x, y = np.meshgrid(np.linspace(-2.2, 0.6, 200), np.linspace(-1.1, 1.1, 200))
    height = (x**2 + 100 * y**2) / 2
    axes.contour(x, y, np.log10(height + 0.01), levels=12, colors="#CCCCCC", linewidths=0.7, linestyles="solid")
    opt = RMSProp([start], lr=0.05)
    descent, paths = start.copy(), {"gradient descent, lr 0.019": [start], "RMSProp, lr 0.05": [start]}
    for _ in range(50):
        descent -= 0.019 * steepness * descent
        opt.step([steepness * opt.params[0]])
        for path, point in zip(paths.values(), (descent, opt.params[0]), strict=True):
            path.append(point.copy())
    for (name, path), style, marker in zip(paths.items(), (STYLES[2], STYLES[0]), "xo", strict=True):
        axes.plot(*np.array(path).T, marker=marker, markersize=3.5, linewidth=1.2, label=name, **style)
    axes.plot(0, 0, marker="*", markersize=12, color="#000000", markerfacecolor="#FFFFFF", linestyle="none")
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.legend(frameon=True, framealpha=1, edgecolor="#FFFFFF", fontsize=9, loc="lower right")
    return figure


def lr() -> Figure:
    """The effect of the learning rate on training, and the length of steps compared with it."""
    figure, (left, right) = _figure(2, "The learning rate is the length of a step")
    for rate, style in zip((1e-4, 1e-3, 1e-2, 1e-1), reversed(STYLES), strict=True):
        _, losses = _train(rate, 32, 20)
        blocks = np.array(losses[: len(losses) // 28 * 28]).reshape(-1, 28)
        left.plot((np.arange(len(blocks)) + 0.5) * 28, blocks.mean(axis=1), label=f"lr {rate:g}", **style)
    left.set_yscale("log")
    left.set_title("digits, batches of 32, a perceptron 64-32-10")
    left.set_xlabel("step")
    left.set_ylabel("training loss, mean of 28 steps")
    left.legend(frameon=False, fontsize=9)
    cases = {
        "decay_rate 0.9": {"decay_rate": 0.9},
        "decay_rate 0.99": {"decay_rate": 0.99},
        "either, with bias_correction": {"decay_rate": 0.9, "bias_correction": True},
    }
    for (name, options), style in zip(cases.items(), STYLES, strict=False):
        opt = RMSProp([np.zeros(1)], lr=0.001, **options)
        path = [0.0] + [-opt.step([np.ones(1)])[0][0] for _ in range(100)]
        right.plot(np.arange(1, 101), np.diff(path) / 0.001, label=name, **style)
    right.set_yscale("log")
    right.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    right.set_title("the same gradient in each step")
    right.set_xlabel("step")
    right.set_ylabel("length of a step / lr")
    right.legend(frameon=False, fontsize=9)
    return figure


def window() -> Figure:
    """How soon the root mean square follows gradients whose size changes, for three decay rates."""
    figure, (axes,) = _figure(
        1, "A window of 1/(1 - decay_rate) steps: long is smooth and slow, short is rough and quick"
    )
    rng = np.random.default_rng(0)
    size = np.repeat([0.1, 1.0, 0.1], [500, 500, 1500])
    gradients = size * rng.standard_normal(len(size))
    axes.plot(size, color="#BBBBBB", linewidth=5, label="true size of the gradients")
    order = (0.9, STYLES[3]), (0.99, STYLES[1]), (0.999, STYLES[0])
    for decay, style in order:
        opt = RMSProp([np.zeros(1)], decay_rate=decay, initial_scale=0.01)
        roots = []
        for gradient in gradients:
            opt.step([np.array([gradient])])
            roots.append(np.sqrt(opt.cache[0][0]))
        axes.plot(roots, label=f"decay_rate {decay}: {1 / (1 - decay):,.0f} steps", linewidth=1.3, **style)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("√v")
    axes.legend(frameon=True, framealpha=1, edgecolor="#FFFFFF", fontsize=9, loc="upper right")
    return figure


def batch() -> Figure:
    """The loss after the same number of rows, by learning rate and size of the batches; geometric means over seeds."""
    figure, (axes,) = _figure(1, "Ten times the batch size needs about √10 times the rate: digits, five passes")
    x, y = _digits()
    rates = 10.0 ** np.arange(-3.5, -0.9, 0.25)
    for size, style, marker in zip((1, 10, 100), STYLES[:0:-1], "osv", strict=True):
        seeds = range(1 if size == 1 else 3)  # the many steps of batches of 1 are an average by themselves
        runs = [[evaluate(_train(rate, size, 5, seed)[0].params, x, y)[0] for seed in seeds] for rate in rates]
        losses = np.exp(np.mean(np.log(runs), axis=1))
        axes.plot(rates, losses, marker=marker, markersize=4, label=f"batches of {size}", **style)
        best = int(np.argmin(losses))
        axes.plot(rates[best], losses[best], marker="o", markersize=12, fillstyle="none", color=style["color"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.set_xlabel("lr (a ring marks the best)")
    axes.set_ylabel("training loss at the end")
    axes.legend(frameon=False, fontsize=9)
    return figure


# AdaGrad and RMSProp follow a minimum that moves every 1,000 steps; learning rates are 1, 2 and 5 times powers of 10.
MOVES = np.repeat([1.0, -1.0, 1.0, -1.0], 1000)
RATES = [digit * power for power in (0.001, 0.01, 0.1, 1.0) for digit in (1, 2, 5)]


def _follow(method: str, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the parameter after each step towards the noisy minimum, and the factor of the gradient in each step."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(len(MOVES))
    opt = RMSProp([np.zeros(1)], lr=lr, decay_rate=0.99)
    p, total = 0.0, 0.0
    path, factors = [], []
    for minimum, wrong in zip(MOVES, noise, strict=True):
        gradient = p - minimum + wrong
        if method == "RMSProp":
            p = opt.step([np.array([gradient])])[0][0]
            factors.append(lr / np.sqrt(opt.cache[0][0]))
        else:  # AdaGrad: J. Duchi, E. Hazan and Y. Singer, 2011
            total += gradient**2
            factors.append(lr / np.sqrt(total))
            p -= factors[-1] * gradient
        path.append(p)
    return np.array(path), np.array(factors)


def _error(path: np.ndarray) -> np.ndarray:
    """Return the mean of the squared distance from the minimum over each 1,000 steps."""
    return ((path - MOVES) ** 2).reshape(-1, 1000).mean(axis=1)


def adagrad() -> Figure:
    """AdaGrad and RMSProp follow a minimum that moves, each with the rate that is best before it moves."""
    title = "AdaGrad divides by a sum, which only grows, and adapts more and more slowly"
    rates = "lr: the best of 0.001, 0.002, 0.005, ..., 5 for the first 1,000 steps, for each method"
    figure, (left, right) = _figure(2, f"{title}\n{rates}")
    right.plot(MOVES, color="#BBBBBB", linewidth=5, label="minimum")
    for method, divisor, style in (("RMSProp", "mean", STYLES[0]), ("AdaGrad", "sum", STYLES[2])):
        lr = min(RATES, key=lambda lr: _error(_follow(method, lr)[0])[0])
        path, factors = _follow(method, lr)
        left.plot(factors, label=f"{method}: lr / √({divisor} of squares)", **style)
        right.plot(path, label=f"{method}, lr {lr:g}", **style)
    left.set_yscale("log")
    left.set_title("factor of the gradient")
    right.set_ylim(-1.5, 2.6)
    right.set_title("a minimum that moves every 1,000 steps")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def epsilon() -> Figure:
    """The length of a step by the size of the gradient, for epsilon outside and inside the root."""
    figure, (axes,) = _figure(1, "Epsilon: only gradients much larger than epsilon make full steps")
    sizes = 10.0 ** np.linspace(-12, 0, 121)
    cases = {
        "1e-8": {"epsilon": 1e-8},
        "1e-8, eps_in_sqrt": {"epsilon": 1e-8, "eps_in_sqrt": True},
        "1e-3": {"epsilon": 1e-3},
    }
    for (name, options), style in zip(cases.items(), STYLES, strict=False):
        opt = RMSProp([np.zeros(len(sizes))], lr=1.0, decay_rate=0.9, **options)
        for _ in range(300):
            opt.step([sizes])
        before = opt.params[0].copy()
        axes.plot(sizes, before - opt.step([sizes])[0], label=f"epsilon {name}", **style)
    axes.set_xscale("log")
    axes.set_xlabel("size of the gradient, the same in each step")
    axes.set_ylabel("length of a step / lr")
    axes.legend(frameon=False, fontsize=9)
    return figure


def dialects() -> Figure:
    """The same problem and the same numbers in four conventions."""
    figure, (axes,) = _figure(1, "One problem, lr 0.02, decay rate 0.9, ε 0.01: four conventions")
    cases: dict[str, Any] = {
        "ε outside the root (reference, PyTorch)": {},
        "ε inside the root (Keras, optax)": {"eps_in_sqrt": True},
        "v starts from 1 (TensorFlow 1)": {"eps_in_sqrt": True, "initial_scale": 1.0},
        "bias correction (optax, optional)": {"bias_correction": True},
    }
    for (name, options), style in zip(cases.items(), STYLES, strict=True):
        opt = RMSProp([np.array([1.0])], lr=0.02, epsilon=1e-2, **options)
        path = [opt.step([0.1 * opt.params[0]])[0][0] for _ in range(80)]
        axes.plot([1.0, *path], label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("p, from 1 to its minimum at 0")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _table(name: str) -> list[list[str]]:
    """The cells of a generated table of performance.md, its heading first; of several processors, the first one's."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _part(name)[2].splitlines()]
    return [rows[0], *rows[2:]]


def _processor(name: str) -> str:
    """The processor of such a table."""
    return _part(name)[1]


def _part(name: str) -> re.Match[str]:
    text = (HERE / "performance.md").read_text(encoding="utf-8")
    pattern = rf"<!-- table: {name} -->\n\n\*\*([^\n]*)\*\*\n\n(^\|.*?)\n\n"
    found = re.search(pattern, text, re.DOTALL | re.MULTILINE)
    assert found, name
    return found


def _seconds(text: str) -> float:
    number, unit = text.replace("*", "").split()[:2]
    return float(number) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]


# What tables call the ways, and what `plot_throughput` does, which then knows their colours.
WAYS = {
    "fastrms auto": "auto",
    "fastrms serial": "serial",
    "fastrms parallel": "parallel",
    "fastrms parallel, bfloat16": "parallel-bfloat16",
    "naive loop": "naive",
    "naive loop, prange": "naive-parallel",
    "NumPy in place": "numpy-in-place",
    "reference class": "reference",
    "torch.optim": "torch",
    "torch.compile of the step": "torch-compile",
    "TensorPlay": "tensorplay",
    "optax, jit, donated": "optax",
}


def throughput() -> Figure:
    """Parameters a second over size, from the tables of one step."""
    records = []
    for dtype in ("float32", "float64"):
        heading, *rows = _table(dtype)
        for label, *times in rows:
            kernel = "limit" if label.startswith("limit") else WAYS.get(label)
            for size, time in zip(heading[1:], times, strict=True):
                if kernel is not None and "%" in time:  # not a dash
                    params = int(size.replace(",", ""))
                    speed = params / _seconds(time) / 1e9
                    threads = re.search(r"(\d+) thread", label)
                    record = {"dtype": dtype, "kernel": kernel, "label": label, "params": params}
                    records.append(record | {"gparam_per_s": speed, "threads": int(threads[1]) if threads else 0})
    figure, _ = plot_throughput(records)
    figure.set_size_inches(10, 4.4)
    return figure


def training_steps() -> Figure:
    """Where the time of training steps goes, from the table of training steps, float32 and lists."""
    figure, (axes,) = _figure(1, f"The time of a training step, float32, on {_processor('in-situ')}")
    figure.set_size_inches(8.2, 3.0)
    networks: list[str] = []
    whole = 1.0
    for network, optimizer, gradients, step, part, faster, *_ in _table("in-situ")[1:]:
        if network:  # otherwise the same as in the row above
            networks.append(network)
        if "float32" not in networks[-1] or gradients != "list":
            continue
        if optimizer == "reference class":
            whole, place = _seconds(step), len(networks) - 1.18
        elif optimizer == "fastrms auto":
            place = len(networks) - 0.82
        else:
            continue
        rest = 100 * (_seconds(step) - _seconds(part)) / whole
        first = len(axes.patches) == 0
        axes.barh(place, rest, 0.32, color="#BBBBBB", label="forward and backward" if first else None)
        optimizing = 100 * _seconds(part) / whole
        axes.barh(place, optimizing, 0.32, left=rest, color="#0072B2", label="optimizer" if first else None)
        label = f"{optimizer}: {step.partition(' ±')[0]}" + f" ({faster})" * (optimizer != "reference class")
        axes.text(rest + optimizing + 1, place, label, fontsize=8, verticalalignment="center")
    names = [name.partition(",")[0] for name in networks if "float32" in name]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("percent of the time with the reference class")
    axes.set_ylabel("layers of the network")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        separate_arrays,
        flat_buffers,
        valley,
        dialects,
        lr,
        window,
        batch,
        adagrad,
        epsilon,
        throughput,
        training_steps,
    )
}


def draw_all(folder: Path, names: Iterable[str] = PICTURES) -> None:
    """Write pictures to `folder`, as NAME.svg."""
    folder.mkdir(exist_ok=True)
    for name in names:
        # Without a date, and with the same identifiers each time: the same picture is the same file.
        with rc_context({"svg.hashsalt": name}):
            PICTURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "_pictures", sys.argv[2:] or PICTURES)
