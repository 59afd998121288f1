"""Pictures by matplotlib, where it is installed: a run's loss, attention maps, what closing slots does."""

import json
from importlib.util import find_spec
from pathlib import Path

from minigpt.files import replacing
from prefix.distributed import log

SMOOTHED = 20  # steps whose mean is the loss curve's thick line


def save_picture(path, inches, draw, *drawn):
    """draw(a matplotlib Figure of these inches, *drawn) as an .svg or .png file. Without matplotlib, one notice."""
    try:
        from matplotlib.figure import Figure  # an optional extra, and slow to import
    except ImportError:
        log(f"{path}: not drawn: that takes matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=inches, layout="constrained")
    draw(figure, *drawn)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)


def draw_loss(run):
    """Write loss.png beside the metrics.jsonl of a run directory. Raises nothing: no run shall fail for a picture."""
    if not find_spec("matplotlib"):  # nobody asked for it
        return
    try:
        with open(run / "metrics.jsonl", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        save_picture(run / "loss.png", (7, 4), loss_curves, lines)
    except Exception as error:
        log(f"{run / 'loss.png'}: not drawn: {error}")


def loss_curves(figure, lines):
    trained = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validated = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    last = [losses[max(0, i - SMOOTHED) : i] for i in range(1, len(losses) + 1)]
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(steps, [sum(near) / len(near) for near in last], color="tab:blue", label=f"mean of {SMOOTHED} steps")
    axes.plot(*zip(*validated or [((), ())]), "o", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend()


def draw_attention(tables, path):
    """Tables (title, lines of cells), one below the other, with their numbers."""
    heights, width = [len(lines) + 3 for _, lines in tables], max(len(lines[0]) for _, lines in tables)
    save_picture(path, (2 + width / 2, sum(heights) / 4), shaded_tables, tables, heights)


def shaded_tables(figure, tables, heights):
    grids = [[[float(cell) for cell in cells] for _, *cells in lines[1:]] for _, lines in tables]
    most = max(max(line) for grid in grids for line in grid)
    for axes, (title, lines), grid in zip(figure.subplots(len(tables), height_ratios=heights), tables, grids):
        axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=2 * most)  # light enough to read the numbers
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xticks(range(len(grid[0])), lines[0][1:], fontsize=7, parse_math=False)
        axes.set_yticks(range(len(grid)), [name for name, *_ in lines[1:]], fontsize=7, parse_math=False)
        for y, (_, *cells) in enumerate(lines[1:]):
            for x, cell in enumerate(cells):
                axes.text(x, y, cell, ha="center", va="center", fontsize=7)


def draw_ablation(table, path):
    """The BLEU of each line of cells (name, BLEU, ...) as a bar."""
    save_picture(path, (2 + len(table) / 4, 4), bleu_bars, table[1:])


def bleu_bars(figure, lines):
    axes = figure.subplots()
    axes.bar([name for name, *_ in lines], [float(bleu) for _, bleu, *_ in lines])
    axes.set_ylabel("BLEU with this closed")
    axes.tick_params(axis="x", rotation=50)
