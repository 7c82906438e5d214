"""Figures of results: a grid of images, a loss curve, the costs of a stream."""

import numpy as np

from .._io import atomic_write
from .frames import tile


def _figure(path, width, height, *draw):
    """Write a PNG figure of width x height inches, with one column of axes for each draw(axes)."""
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display and leaves no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    for part, fill in enumerate(draw):
        fill(figure.add_subplot(1, len(draw), part + 1))
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def save_grid(images, row_labels, path, title=None, column_labels=()):
    """Write images as a grid with labelled rows.

    Args:
        images: (rows * columns, C, H, W) in [-1, 1] (clamped), C 1 or 3, row by row.
        row_labels: one text per row.
        path: file to write.
        title: text above the grid.
        column_labels: one text per column, or none.
    """
    rows, gap = len(row_labels), 2
    columns = images.unflatten(0, (rows, -1)).shape[1]
    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels to draw, got {channels}")
    canvas = tile((images.detach().float().cpu().clamp(-1, 1) + 1) / 2, columns=columns, gap=gap, fill=1.0)

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
    """Write a figure of the loss at every step and its running mean."""
    from matplotlib.ticker import StrMethodFormatter

    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), "valid")

    def draw(axes):
        axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=0.6, label="each step")
        steps = np.arange(len(smooth)) + (window - 1) / 2
        axes.plot(steps, smooth, color="tab:blue", linewidth=1.6, label=f"mean of {window} steps")
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
    """Write a figure of the time (median of eleven neighbouring frames) and the memory of streams, frame by frame.

    costs: {name: {"milliseconds": [...], "bytes": [...]}}, one number per frame.
    """

    def draw_one(axes, curves, label):
        for name, values in curves.items():
            axes.plot(values, label=name, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("frame")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()

    def median_of_neighbours(values, half=5):  # other programs can slow single frames down
        return [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]

    milliseconds = {name: median_of_neighbours(of_frame["milliseconds"]) for name, of_frame in costs.items()}
    mebibytes = {name: np.array(of_frame["bytes"]) / 2**20 for name, of_frame in costs.items()}

    def times(axes):
        draw_one(axes, milliseconds, "milliseconds a frame")
        axes.set_title(title, fontsize=10, loc="left")

    _figure(path, 9, 3.6, times, lambda axes: draw_one(axes, mebibytes, "MiB remembered"))
