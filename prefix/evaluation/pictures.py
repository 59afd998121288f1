"""All that matplotlib draws, where it is installed: a run's loss, attention maps, what closing slots does."""

import json
from pathlib import Path

from minigpt.files import replacing
from prefix.distributed import log

SMOOTHED = 20  # steps whose mean is the loss curve's thick line


def save_picture(path, draw, inches):
    """draw(a matplotlib Figure of these inches) as an .svg or .png file, whole or not at all; without matplotlib one
    notice."""
    try:
        from matplotlib.figure import Figure  # an optional extra, and slow to import
    except ImportError:
        log(f"{path}: not drawn: that takes matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=inches, layout="constrained")
    draw(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)


def draw_loss(run):
    """Write loss.png beside the metrics.jsonl of a run directory. Raises nothing: no run shall fail for a picture."""
    try:
        with open(run / "metrics.jsonl", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        save_picture(run / "loss.png", lambda figure: draw_curves(figure.subplots(), lines), (7, 4))
    except Exception as error:
        log(f"{run / 'loss.png'}: not drawn: {error}")


def draw_curves(axes, lines):
    trained = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validated = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    last = [losses[max(0, i - SMOOTHED) : i] for i in range(1, len(losses) + 1)]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    axes.plot(steps, [sum(near) / len(near) for near in last], color="tab:blue", label=f"mean of {SMOOTHED} steps")
    if validated:
        axes.plot(*zip(*validated), "o", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend()


def draw_panels(panels, path):
    """attention_maps' Panels one below the other, a number in each cell."""
    most = max(panel.values.max().item() for panel in panels)

    def draw(figure):
        heights = [len(panel.rows) + 5 for panel in panels]
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels):
            axes.imshow(
                panel.values.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=2 * most
            )  # so light that numbers stay legible
            axes.set_title(panel.title, loc="left", fontsize=9)
            slanted = {"rotation": 50, "ha": "right", "fontsize": 7, "parse_math": False}
            axes.set_xticks(range(len(panel.columns)), panel.columns, **slanted)
            axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=7)
            for r, row in enumerate(panel.values.tolist()):
                for c, value in enumerate(row):
                    axes.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)

    longest = max(len(panel.columns) for panel in panels)
    save_picture(path, draw, (2.5 + longest / 4, sum(len(panel.rows) / 4 + 1.3 for panel in panels)))


def draw_ablation(found, path):
    """The BLEU of each ablation.Ablation as a bar."""

    def draw(figure):
        axes = figure.subplots()
        axes.bar([ablation.closed for ablation in found], [ablation.bleu for ablation in found])
        axes.set_ylabel("BLEU with this closed")
        axes.tick_params(axis="x", rotation=50)

    save_picture(path, draw, (2 + len(found) / 4, 4))
