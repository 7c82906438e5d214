"""Pictures of results: a grid of images with a label per row, and a loss curve."""

import numpy as np

from .._io import atomic_write


def _figure(path, width, height, *draw):
    """Let each draw(axes) fill its part, side by side, of a figure of that size in inches; write it to `path` (PNG)."""
    from matplotlib.figure import Figure  # not pyplot: needs no display and leaves no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    for part, fill in enumerate(draw):
        fill(figure.add_subplot(1, len(draw), part + 1))
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def save_grid(images, row_labels, path, title=None, column_labels=()):
    """Write images as a grid, one labelled row after the other.

    images: (rows * columns, C, H, W) in [-1, 1] (clamped), C 1 or 3; row_labels: one text per row; column_labels: one per
    column, or none.
    """
    rows, gap = len(row_labels), 2
    images = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).unflatten(0, (rows, -1))  # (rows, columns, C, H, W)
    columns, channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels to draw, got {channels}")
    canvas = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            canvas[:, top : top + height, left : left + width] = images[row, column]

    def draw(axes):
        axes.imshow(canvas.permute(1, 2, 0).numpy().squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_yticks([row * (height + gap) + (height - 1) / 2 for row in range(rows)], row_labels, fontsize=12)
        axes.set_xticks([i * (width + gap) + (width - 1) / 2 for i in range(len(column_labels))], column_labels)
        axes.tick_params(length=0, labelbottom=False, labeltop=bool(column_labels))
        axes.spines[:].set_visible(False)
        if title:
            axes.set_title(title, fontsize=11)

    inches = 6.0 / max(canvas.shape[1:])
    _figure(path, 1.0 + canvas.shape[2] * inches, 0.6 + canvas.shape[1] * inches, draw)


def save_loss_curve(losses, path, title=None):
    """Write the loss of every step, and its running mean, as a curve."""
    from matplotlib.ticker import StrMethodFormatter

    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), "valid")

    def draw(axes):
        axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=0.6, label="each step")
        axes.plot(
            np.arange(len(smooth)) + (window - 1) / 2,
            smooth,
            color="tab:blue",
            linewidth=1.6,
            label=f"mean of {window} steps",
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()
        axes.grid(alpha=0.3, which="both")
        if title:
            axes.set_title(title, fontsize=11)

    _figure(path, 7, 4, draw)


def save_stream_costs(costs, path, title=None):
    """Write time (the median of eleven neighbouring frames) and memory of a stream as two curves beside each other.

    costs: {name: {"milliseconds": [...], "bytes": [...]}}, one entry a frame.
    """

    def draw_one(axes, key, scale, label):
        for name, of_frame in costs.items():
            axes.plot(np.array(of_frame[key]) / scale, label=name, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("frame")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()

    def median_of_neighbours(values, half=5):  # other programs disturb single frames
        return [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]

    costs = {
        name: {**of_frame, "milliseconds": median_of_neighbours(of_frame["milliseconds"])}
        for name, of_frame in costs.items()
    }

    def times(axes):
        draw_one(axes, "milliseconds", 1, "milliseconds a frame")
        axes.set_title(title, fontsize=10, loc="left")

    _figure(path, 9, 3.6, times, lambda axes: draw_one(axes, "bytes", 2**20, "MiB remembered"))


def save_crossover(results, path):
    """Draw what `benchmarks.crossover` measured: seconds over tokens, a column for each size.

    A ring marks the length from which on a form is faster than attention.
    """
    from matplotlib.figure import Figure

    cases = results["cases"]
    sizes = list(dict.fromkeys(case["size"] for case in cases))
    rows = list(dict.fromkeys((case["what"], case["passes"]) for case in cases))
    figure = Figure(figsize=(4 * len(sizes), 2.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(sizes), squeeze=False, sharex=True)
    for case in cases:
        axes = grid[rows.index((case["what"], case["passes"]))][sizes.index(case["size"])]
        for name, seconds in case["seconds"].items():
            (line,) = axes.loglog(
                results["tokens"], [value or np.nan for value in seconds], "o-", markersize=3, label=name,
                color="black" if name == "attention" else None,
            )  # fmt: skip
            even = case["break_even"].get(name)
            if even is not None:
                at = results["tokens"].index(even)
                axes.plot(even, seconds[at], "o", markersize=10, fillstyle="none", color=line.get_color())
        axes.set_title(f"{case['what']} {case['size']}, {case['passes']}", fontsize=10)
        axes.set_xticks(results["tokens"], [f"{tokens:,}" for tokens in results["tokens"]], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=8)
    for row in grid:
        row[0].set_ylabel("seconds")
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
