"""What a run is made of: its settings as resolved from the command line or read back, and its directory.

A run is a directory, runs/<time> by default, with these files:

    config.json            the command as resolved: what --resume goes on with
    metrics.jsonl          a line for each step and each validation; locked while a run writes here
    last/                  everything needed to go on exactly (state.py)
    prefix.safetensors     the best slots on validation
    lr-0.1/ ...            trials of several rates, each a run of its own (rates.py)

python -m prefix.run lists the runs.
"""

import itertools
import json
import time
from pathlib import Path

import torch

from minigpt import UserError, checkpoint
from minigpt.files import TEMPORARY, read_object, replacing
from prefix import distributed, prefix_file
from prefix.banks import MAX_SLOTS
from prefix.data import rows
from prefix.distributed import log
from prefix.state import METRICS
from prefix.trainer import Settings

DEMO = Path(__file__).parent / "demo"
DEMO_CORPUS, DEMO_PREFIX = DEMO / "en-fr.csv", DEMO / "prefix.safetensors"
RUNS = Path("runs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = {
    "device": ["auto", "cpu", "cuda", "mps"],
    "dtype": ["auto", *DTYPES],
    "attention": ["auto", "fused", "plain"],
}
MAX_BATCH = 1 << 20  # examples, whose list is in memory

STEPS = {"demo": 300, "published": 2048}  # two minutes on a CPU; as the notebook
# Learning rates count in each base's own units, so one serves all bases and starts (tests/benchmarks/rates.py).
LR, REPARAM_LR = 0.3, 0.003
# Options that may be new when a run goes on.
FREE = ("steps", "save_every")
MACHINE = ("device", "dtype", "attention", "checkpoint_activations", "micro_batch_tokens")
# The fields of config.json.
FIELDS = ("model", "data", "columns", "pairs", "limit", "max_tokens", "init", "from_prefix", "train_banks", "reparam")
FIELDS += ("prefix_len", "position_offset", "settings", "machine")


def resolve(args):
    """The command with its defaults filled in: what config.json keeps and --resume reads."""
    if distributed.rank() == 0:
        check_unused(args.out)
    if args.prefix_len > MAX_SLOTS:
        raise UserError(f"--prefix-len {args.prefix_len:,}: a bank has {MAX_SLOTS:,} slots at most")
    if args.batch_size > MAX_BATCH:
        raise UserError(f"--batch-size {args.batch_size:,}: a step has {MAX_BATCH:,} pairs at most")
    name = args.model or checkpoint.default(log)
    demo = checkpoint.find(name).resolve() == checkpoint.DEMO.resolve()
    if demo and not args.model and args.data not in (None, ["demo"]):
        toy = "The demo is a toy that knows short English and French sentences. A real model learns your data better"
        log(f"{toy}: --model gpt2 (0.5 GB to download), or gpt2-xl on a GPU (6.4 GB)")
    if args.init == "zero-effect" and args.position_offset == "prefix":
        log(
            f"--position-offset prefix starts text at position {args.prefix_len}, behind nothing, where the base itself "
            "is worse: --init text stands in those positions"
        )
    paths = data_paths(args.data)
    resolved = {
        "model": model_name(name),
        "data": data_names(paths),
        "columns": resolve_columns(paths, args.columns, args.pairs),
        "position_offset": args.prefix_len if args.position_offset == "prefix" else 0,
        "from_prefix": args.from_prefix and str(prefix_file.find(args.from_prefix).resolve()),
        "settings": vars(resolve_settings(args, "demo" if demo else "published")),
        "machine": {name: getattr(args, name) for name in MACHINE},
    }
    config = {name: resolved[name] if name in resolved else getattr(args, name) for name in FIELDS}
    directions(config)  # is there something to train?
    return config


def resolve_settings(args, base):
    """base: "demo" or "published"."""
    steps = args.steps or STEPS[base]
    rates = args.lr or [REPARAM_LR if args.reparam else LR]
    return Settings(
        steps=steps,
        lr=rates if len(rates) > 1 else rates[0],
        batch_size=args.batch_size,
        warmup=steps // 20 if args.warmup is None else args.warmup,
        eval_every=max(1, steps // 6) if args.eval_every is None else args.eval_every,
        save_every=args.save_every or 50,
        seed=args.seed,
    )


def resolve_columns(paths, columns, pairs):
    """The names of the banks: those of --columns, else of --pairs, else the table's own."""
    columns = columns or (pairs and list(dict.fromkeys(name for pair in pairs for name in pair.split(":"))))
    resolved = list(rows.resolve_columns(paths, columns))
    if not columns and (unused := rows.unused_columns(paths, resolved)):
        log(f"Columns not used: {', '.join(unused)} (--columns names the columns to train on)")
    return resolved


def directions(config):
    """The (source, target) columns to train, by number, or None for all: those of --pairs with a bank to train.
    Raises UserError for a pair or a bank that is not there, and for one that would start anew and never be trained."""
    columns, trained = config["columns"], config["train_banks"] or config["columns"]
    known = {f"{s}:{t}": (columns.index(s), columns.index(t)) for s, t in itertools.permutations(columns, 2)}
    if wrong := [name for name in trained if name not in columns]:
        raise UserError(f"--train-banks {wrong[0]}: no such column; there are {', '.join(columns)}")
    if wrong := [pair for pair in config["pairs"] or () if pair not in known]:
        raise UserError(f"--pairs {wrong[0]}: not two of the columns {', '.join(columns)} with a colon between")
    chosen = [known[pair] for pair in config["pairs"] or known]
    moved = {columns.index(name) for name in trained}
    chosen = [pair for pair in chosen if moved & set(pair)]
    if idle := [columns[i] for i in moved.difference(*chosen)]:
        raise UserError(f"--pairs has no pair with {idle[0]}: leave it out of --columns or --train-banks")
    there = prefix_file.read_header(config["from_prefix"])["banks"] if config["from_prefix"] else []
    if new := [name for name in columns if name not in (*trained, *there)]:
        raise UserError(f"--train-banks leaves {new[0]} untrained: give a prefix that has this bank, --from-prefix")
    return None if len(chosen) == len(known) else chosen


def resume_config(args):
    """The config of the run that --resume names, read by process 0. What `args` does not say of the machine is as the
    run began. Raises UserError where there is no run, or its config is not of this version."""
    config = distributed.broadcast(read_config(args.resume) if distributed.rank() == 0 else None)
    config["settings"] |= {name: value for name in FREE if (value := getattr(args, name))}
    for name in set(MACHINE) - {"micro_batch_tokens"}:  # of which the saved state knows more
        if getattr(args, name) in ("auto", False, None):
            setattr(args, name, config["machine"].get(name))
    return config


def read_config(out):
    path = out / "config.json"
    if not path.is_file():
        raise UserError(f"{out}: no run to go on with: {path} is not there (python -m prefix.run lists the runs)")
    config = read_object(path)
    for part, fields in ((config, FIELDS), (config.get("settings", {}), Settings.__dataclass_fields__)):
        for name in sorted(part.keys() ^ set(fields)):
            what = "unknown" if name in part else "missing"
            raise UserError(f"{path}: not the config of a run of this version: {name} is {what}")
    return config


def check_unused(out):
    """A run never writes over what is there. What one leaves that was killed before it began is nothing: an empty file
    for the lock, and a temporary one."""
    nothing = lambda path: path.match(f".*{TEMPORARY}") or (path.name == METRICS and not path.stat().st_size)
    if out and out.exists() and not all(map(nothing, out.iterdir())):
        raise UserError(f"--out {out}: the directory is not empty; name another, or go on with --resume {out}")


def make_directory(out):
    """`out`, or a new directory named by the time."""
    if out:
        check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    while True:
        try:
            out = RUNS / time.strftime("%Y%m%d-%H%M%S")
            out.mkdir(parents=True)
            return out
        except FileExistsError:  # by a run of this same second
            time.sleep(0.1)


def write_config(out, config):
    with replacing(out / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def newest_run(needs=()):
    """The prefix file of the newest run that has the banks `needs`, or None. A run that ended above its base's own
    loss is passed over with a notice."""
    for path in sorted(RUNS.glob("*/prefix.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True):
        header = prefix_file.read_header(path)
        loss, base_loss = (header["training"].get(name) for name in ("val_loss", "base_loss"))
        if not set(needs) <= set(header["banks"]):
            continue
        if loss is None or base_loss is None or loss < base_loss:
            return path
        log(
            f"Passing over {path.parent}: its validation loss, {loss:.2f}, is not below the base's own, {base_loss:.2f}"
        )
    return None


def model_name(name):
    """How a prefix file records its base: a directory absolute, anything else by its name."""
    return name if name == "demo" or not Path(name).is_dir() else str(Path(name).resolve())


def data_paths(paths):
    """The files to read: those given, with "demo" (and None) standing for the sample corpus."""
    return [str(DEMO_CORPUS) if path == "demo" else path for path in paths or ["demo"]]


def data_names(paths):
    """How a run records its files: absolute, but the sample corpus by its name, wherever the project lies."""
    return ["demo" if Path(path).resolve() == DEMO_CORPUS.resolve() else str(Path(path).resolve()) for path in paths]


def list_runs():
    """A line for each run: name, base, columns, steps, validation loss, when."""
    for path in sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime):
        out, config = path.parent, read_config(path.parent)
        prefix = out / "prefix.safetensors"
        record = prefix_file.read_header(prefix)["training"] if prefix.is_file() else {}
        loss = "-" if record.get("val_loss") is None else f"{record['val_loss']:.4f}"
        steps, when = config["settings"]["steps"], time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        yield str(out), config["model"], ",".join(config["columns"]), f"{steps:,} steps", f"loss {loss}", when


if __name__ == "__main__":
    table = list(list_runs())
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
