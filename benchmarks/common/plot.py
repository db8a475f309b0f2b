"""Recall against the share of keys scanned, one line per index, one panel per set of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

_STYLES = {
    "graph": ("#d62728", "o"),
    "graph int8": ("#ff9896", "o"),
    "scan": ("#1f77b4", "s"),
    "auto": ("#2ca02c", "*"),
    "hnsw plain": ("#c5b0d5", "v"),
    "hnsw": ("#9467bd", "v"),
    "ivf": ("#8c564b", "^"),
    "ivfpq": ("#e377c2", "<"),
    "nsg": ("#7f7f7f", ">"),
    "vamana": ("#bcbd22", "D"),
}


def recall_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `path` with the suffixes .png and .svg.

    Args:
        rows: Of index_search: `vectors`, `index`, `recall`, `visited_share`, `us_per_query`, means over heads.
    """
    panels = list(dict.fromkeys(row["vectors"] for row in rows))
    pyplot.rcParams["svg.hashsalt"] = "rabatch"
    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(4.2 * len(panels), 7.6), squeeze=False, sharey=True, layout="constrained"
    )
    for column, panel in enumerate(panels):
        for row, (key, label) in enumerate(
            (("visited_share", "share of keys scanned"), ("us_per_query", "µs per query"))
        ):
            axis = axes[row][column]
            for name, (color, marker) in _STYLES.items():
                line = sorted((r[key], r["recall"]) for r in rows if r["vectors"] == panel and r["index"] == name)
                if line:
                    x, y = np.array(line).T
                    axis.plot(x, y, color=color, marker=marker, label=name, markersize=5, linewidth=1.4)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_ylim(0, 1.02)
            axis.grid(alpha=0.3)
            axis.set_xlabel(label)
            if row == 0:
                axis.set_title(panel)
                axis.axhline(0.95, color="black", linewidth=0.6, linestyle=":")
        axes[0][0].set_ylabel("recall@100")
        axes[1][0].set_ylabel("recall@100")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    for suffix in (".png", ".svg"):
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata=metadata)
    pyplot.close(figure)
