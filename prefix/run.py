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
from contextlib import contextmanager
from pathlib import Path

from minigpt import UserError, checkpoint
from minigpt.files import TEMPORARY, locked, read_object, remove_leftovers, replacing
from prefix import distributed, prefix_file
from prefix.data import rows
from prefix.distributed import log
from prefix.state import METRICS
from prefix.trainer import Settings

DEMO = Path(__file__).parent / "demo"
DEMO_CORPUS, DEMO_PREFIX = DEMO / "en-fr.csv", DEMO / "prefix.safetensors"
RUNS, PREFIX = Path("runs"), "prefix.safetensors"

DEMO_STEPS, STEPS = 300, 2048  # two minutes on a CPU; as the notebook
# Learning rates count in each base's own units, so one serves all bases and starts (tests/benchmarks/rates.py).
LR, REPARAM_LR = 0.3, 0.003
# Options that may be new when a run goes on.
FREE = ("steps", "save_every")
MACHINE = ("device", "dtype", "attention", "checkpoint_activations", "micro_batch_tokens")
# The fields of config.json: options as they were given, and those that `resolve` fills in.
GIVEN = ("prefix_len", "pairs", "train_banks", "limit", "max_tokens", "init", "reparam")
FIELDS = (*GIVEN, "model", "data", "columns", "from_prefix", "position_offset", "settings", "machine")


def resolve(args):
    """The command with its defaults filled in: what config.json keeps and --resume reads."""
    if distributed.rank() == 0:
        check_unused(args.out)
    name = args.model or checkpoint.default(log)
    is_demo = checkpoint.find(name).resolve() == checkpoint.DEMO.resolve()
    steps = args.steps or (DEMO_STEPS if is_demo else STEPS)
    rates = args.lr or [REPARAM_LR if args.reparam else LR]
    lr = rates if len(rates) > 1 else rates[0]
    warmup = steps // 20 if args.warmup is None else args.warmup
    eval_every = max(1, steps // 6) if args.eval_every is None else args.eval_every
    settings = Settings(steps, lr, args.batch_size, warmup, eval_every, args.save_every or 50, args.seed)
    return {name: getattr(args, name) for name in GIVEN} | {
        "model": model_name(name),
        "data": [path if path == "demo" else str(Path(path).resolve()) for path in args.data or ["demo"]],
        "columns": columns_of(args),
        "from_prefix": args.from_prefix and str(prefix_file.find(args.from_prefix).resolve()),
        "position_offset": args.prefix_len if args.position_offset == "prefix" else 0,
        "settings": vars(settings),
        "machine": {name: getattr(args, name) for name in MACHINE},
    }


def columns_of(args):
    """The columns to train on: those that --columns or --pairs name, else the table's own, with a word on what is odd."""
    table = rows.Table(data_paths(args.data))
    named = args.columns or [*dict.fromkeys(name for pair in args.pairs or () for name in pair.split(":"))]
    columns = list(table.places(named))
    if unused := [name for name in table.names if name and name not in columns and not named]:
        log(f"Columns not used: {', '.join(unused)} (--columns names the columns to train on)")
    elif table.line and not named and not all(map(rows.is_language, columns)):
        header = f"Line {table.line} is read as the names of the columns: {', '.join(columns)}"
        log(f"{header} (if it is a row, put a line of names above it)")
    return columns


def directions(config):
    """The (source, target) columns to train, by number, or None for all: those of --pairs with a bank to train.
    Raises UserError for a pair or a bank that is not there, and for one that would start anew and never be trained."""
    columns, trained = config["columns"], config["train_banks"] or config["columns"]
    pairs = {f"{s}:{t}": (columns.index(s), columns.index(t)) for s, t in itertools.permutations(columns, 2)}
    for option, named, there in (("train-banks", trained, columns), ("pairs", config["pairs"] or (), pairs)):
        for name in sorted(set(named) - set(there)):
            raise UserError(f"--{option} {name}: not one of {', '.join(there)}")
    chosen = [pairs[pair] for pair in dict.fromkeys(config["pairs"] or pairs)]
    chosen = [(s, t) for s, t in chosen if columns[s] in trained or columns[t] in trained]
    for name in sorted(set(trained) - {columns[i] for pair in chosen for i in pair}):
        raise UserError(f"--pairs has no pair with {name}: leave it out of --columns or --train-banks")
    there = prefix_file.read_header(config["from_prefix"])["banks"] if config["from_prefix"] else []
    for name in sorted(set(columns) - {*trained, *there}):
        raise UserError(f"--train-banks leaves {name} untrained: give a prefix that has this bank, --from-prefix")
    return None if len(chosen) == len(pairs) else chosen


def resume_config(args):
    """The config of the run that --resume names, read by process 0. What `args` does not say of the machine is as the
    run began. Raises UserError where there is no run, or its config is not of this version."""
    path = args.resume / "config.json"
    config = distributed.broadcast(read_config(path) if distributed.rank() == 0 else None)
    config["settings"] |= {name: value for name in FREE if (value := getattr(args, name))}
    for name, value in config["machine"].items():
        if getattr(args, name) in ("auto", False):  # not of micro_batch_tokens, of which the saved state knows more
            setattr(args, name, value)
    return config


def read_config(path):
    """The config of a run. Raises UserError where there is none, or one that another version wrote."""
    if not path.is_file():
        raise UserError(f"no run to go on with: no {path} (python -m prefix.run lists the runs)")
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


def unused_name():
    """runs/<time>, or, where another run began in that second, runs/<time>-2 and so on."""
    first = RUNS / time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([first], (first.with_name(f"{first.name}-{n}") for n in itertools.count(2)))
    return next(path for path in names if not path.exists())


@contextmanager
def directory(new, old=None):
    """Inside, the run directory is this run's alone: `old`, to go on there, or `new`, which is made (None: runs/<time>).
    Yields its path, process 0's. Raises UserError where another run is there, or at work there."""
    if distributed.rank() > 0:
        yield distributed.broadcast(None)
        return
    out = old or new or unused_name()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / METRICS):
        if not old:
            check_unused(out)  # again: another run may have been faster
        remove_leftovers(out)
        yield distributed.broadcast(out)


def write_config(out, config):
    if distributed.rank() == 0:
        with replacing(out / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def each_run(file, read):
    """Yield (path, read(path)) for this file of each run, the newest first. A file that is damaged, or that another
    version wrote, is passed over with a notice."""
    for path in sorted(RUNS.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            yield path, read(path)
        except UserError as error:
            log(f"Passing over {error}")


def newest_run(needs=()):
    """The prefix file of the newest run that has two banks or more, and those in `needs`; or None."""
    runs = each_run(PREFIX, prefix_file.read_header)
    return next((path for path, header in runs if len(header["banks"]) > 1 and set(needs) <= set(header["banks"])), None)


def model_name(name):
    """How a prefix file records its base: a directory absolute, anything else by its name."""
    return name if name == "demo" or not Path(name).is_dir() else str(Path(name).resolve())


def data_paths(paths):
    """The files to read: those given, with "demo" (and None) standing for the sample corpus."""
    return [str(DEMO_CORPUS) if path == "demo" else path for path in paths or ["demo"]]


def list_runs():
    """A line for each run, the newest first: folder, base, columns, steps, validation loss, when."""
    records = {path.parent: header["training"] for path, header in each_run(PREFIX, prefix_file.read_header)}
    for path, config in each_run("config.json", read_config):
        loss, steps = records.get(path.parent, {}).get("val_loss"), config["settings"]["steps"]
        loss = "-" if loss is None else f"{loss:.4f}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        yield str(path.parent), config["model"], ",".join(config["columns"]), f"{steps:,} steps", f"loss {loss}", when


if __name__ == "__main__":
    table = list(list_runs())
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
