"""Pictures, by matplotlib (an optional extra, and slow to import): a run's loss, attention maps, what closing slots does."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from minigpt.files import replacing
from prefix.distributed import log

SMOOTHED = 20  # steps whose mean is the loss curve's thick line


def new_figure(width, height):
    """An empty Figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Write a Figure as an .svg or .png file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)


def draw_loss(run):
    """Write loss.png beside the metrics.jsonl of a run directory, where matplotlib is installed: nobody asked for it. Raises
    nothing: no run shall fail for a picture."""
    if not find_spec("matplotlib"):
        return
    try:
        with open(run / "metrics.jsonl", encoding="utf-8") as file:
            save(loss_figure([json.loads(line) for line in file]), run / "loss.png")
    except Exception as error:
        log(f"{run / 'loss.png'}: not drawn: {error}")


def loss_figure(lines):
    """The curves of lines of metrics.jsonl."""
    points = lambda name: [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, losses = np.array(points("loss")).reshape(-1, 2).T
    means = [losses[max(0, i - SMOOTHED) : i].mean() for i in range(1, len(losses) + 1)]
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {SMOOTHED} steps")
    axes.plot(*np.array(points("val_loss")).reshape(-1, 2).T, "o", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend()
    return figure


def attention_figure(tables):
    """Tables (title, lines of cells), one below the other, with their numbers."""
    heights, width = [len(lines) + 3 for _, lines in tables], max(len(lines[0]) for _, lines in tables)
    grids = [[[float(cell) for cell in cells] for _, *cells in lines[1:]] for _, lines in tables]
    most = max(max(line) for grid in grids for line in grid)
    figure = new_figure(2 + width / 2, sum(heights) / 4)
    for axes, (title, lines), grid in zip(figure.subplots(len(tables), height_ratios=heights), tables, grids):
        axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=2 * most)  # light enough to read the numbers
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xticks(range(len(grid[0])), lines[0][1:], fontsize=7, parse_math=False)
        axes.set_yticks(range(len(grid)), [name for name, *_ in lines[1:]], fontsize=7, parse_math=False)
        for y, (_, *cells) in enumerate(lines[1:]):
            for x, cell in enumerate(cells):
                axes.text(x, y, cell, ha="center", va="center", fontsize=7)
    return figure


def ablation_figure(table):
    """The BLEU of each line of cells (name, BLEU, ...) below the head as a bar."""
    figure = new_figure(2 + len(table) / 4, 4)
    axes = figure.subplots()
    axes.bar([name for name, *_ in table[1:]], [float(bleu) for _, bleu, *_ in table[1:]])
    axes.set_ylabel("BLEU with this closed")
    axes.tick_params(axis="x", rotation=50)
    return figure
