"""The figure of the suite `models`."""

import numpy as np

from pom_ext._io import atomic_write


def save_crossover(results, path):
    """Draw the results of the suite `models`: seconds over tokens, a column for each size.

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
            style = {"markersize": 3, "label": name, "color": "black" if name == "attention" else None}
            (line,) = axes.loglog(results["tokens"], [value or np.nan for value in seconds], "o-", **style)
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
