"""Pictures of results: a grid of images with a label per row, and a loss curve."""

import numpy as np

from .checkpoint import written_aside


def _figure(path, width, height, draw):
    """Let draw(axes) fill a figure of that size in inches, and write it to `path` (PNG)."""
    from matplotlib.figure import Figure  # not pyplot: needs no display and leaves no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot())
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def save_grid(images, row_labels, path, title=None):
    """Write images as a grid, one labelled row after the other.

    images: (rows * columns, C, H, W) in [-1, 1] (clamped), C 1 or 3; row_labels: one text per row.
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
        axes.set_xticks([])
        axes.tick_params(length=0)
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
