"""What a run is made of: its settings as resolved from the command line or read back, its directory, its first slots.

A run is a directory, runs/<time> by default, with these files:

    config.json            the settings, resolved: what --resume goes on with
    metrics.jsonl          a line for each step and each validation; locked while a run writes here
    last/                  everything needed to go on exactly (state.py)
    prefix.safetensors     the best slots on validation
"""

import json
import time
from pathlib import Path

import torch

from minigpt import UserError, checkpoint
from minigpt.files import TEMPORARY, read_object, replacing
from prefix.banks import MAX_SLOTS
from prefix.data import rows
from prefix.distributed import log
from prefix.init import INITS
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

# What suits the base: the demo learns in two minutes on a CPU, a published model takes the notebook's 2,048 steps.
# The demo's learning rates come from a sweep (tests/benchmarks/RESULTS.md); those of published models are not measured.
STEPS = {"demo": 300, "published": 2048}
LR = {
    "demo": {"text": 0.1, "random": 0.1, "zero-effect": 0.1},
    "published": {"text": 0.01, "random": 0.03, "zero-effect": 0.03},
}
REPARAM_LR = {
    "demo": {"text": 0.001, "random": 0.003, "zero-effect": 0.001},
    "published": {"text": 0.001, "random": 0.001, "zero-effect": 0.001},
}
# Options that may be new when a run goes on.
FREE = ("steps", "save_every")
MACHINE = ("device", "dtype", "attention", "checkpoint_activations", "micro_batch_tokens")


def resolve(args):
    """The command with its defaults filled in: what config.json keeps and --resume reads."""
    check_unused(args.out)
    if args.prefix_len > MAX_SLOTS:
        raise UserError(f"--prefix-len {args.prefix_len:,}: a bank has {MAX_SLOTS:,} slots at most")
    name = args.model or checkpoint.default(log)
    demo = checkpoint.find(name).resolve() == checkpoint.DEMO.resolve()
    paths = data_paths(args.data)
    columns = list(rows.resolve_columns(paths, args.columns))
    unused = [] if args.columns else rows.unused_columns(paths, columns)
    if unused:
        log(f"Columns not used: {', '.join(unused)} (--columns names the columns to train on)")
    if args.init == "zero-effect" and args.position_offset == "prefix":
        log(
            f"--position-offset prefix starts text at position {args.prefix_len}, behind nothing, where the base itself "
            "is worse: --init text stands in those positions"
        )
    steps = args.steps or STEPS["demo" if demo else "published"]
    settings = Settings(
        steps=steps,
        lr=args.lr or (REPARAM_LR if args.reparam else LR)["demo" if demo else "published"][args.init],
        batch_size=args.batch_size,
        warmup=steps // 20 if args.warmup is None else args.warmup,
        eval_every=max(1, steps // 6) if args.eval_every is None else args.eval_every,
        save_every=args.save_every or 50,
        seed=args.seed,
        slot_dropout=args.slot_dropout,
        label_smoothing=args.label_smoothing,
    )
    return {
        "model": model_name(name),
        "data": data_names(paths),
        "columns": columns,
        "limit": args.limit,
        "max_tokens": args.max_tokens,
        "init": args.init,
        "reparam": args.reparam,
        "prefix_len": args.prefix_len,
        "position_offset": args.prefix_len if args.position_offset == "prefix" else 0,
        "settings": vars(settings),
        "machine": {name: getattr(args, name) for name in MACHINE},
    }


def resume_config(args):
    """The run's config. What `args` does not say of the machine is as the run began."""
    path = args.resume / "config.json"
    config = read_object(path)
    try:
        check_config(config)
        config["settings"] |= {name: value for name in FREE if (value := getattr(args, name))}
        Settings(**config["settings"])
    except (UserError, TypeError) as error:  # a TypeError: a setting that Settings does not have, or lacks
        raise UserError(f"{path} is not the config of a run: {error}") from error
    for name in set(MACHINE) - {"micro_batch_tokens"}:  # of which the saved state knows more
        if getattr(args, name) in ("auto", False, None):
            setattr(args, name, config["machine"].get(name))
    return config


def check_config(config):
    """Raises UserError where a run's config is not one that resolve() makes, but for its Settings."""
    is_whole = lambda value, least: type(value) is int and least <= value < 2**63
    are_texts = lambda value: isinstance(value, list) and value and all(isinstance(text, str) for text in value)
    sound = {
        "model": lambda value: isinstance(value, str),
        "data": are_texts,
        "columns": are_texts,
        "limit": lambda value: value is None or is_whole(value, 1),
        "max_tokens": lambda value: is_whole(value, 3),
        "init": lambda value: value in INITS,
        "reparam": lambda value: value in (None, False, True),
        "prefix_len": lambda value: is_whole(value, 1) and value <= MAX_SLOTS,
        "position_offset": lambda value: is_whole(value, 0),
        "settings": lambda value: isinstance(value, dict),
        "machine": lambda value: (
            isinstance(value, dict)
            and all(value.get(name, "auto") in choices for name, choices in CHOICES.items())
            and value.get("checkpoint_activations", False) in (False, True)
            and ((tokens := value.get("micro_batch_tokens")) is None or is_whole(tokens, 1))
        ),
    }
    for name, is_sound in sound.items():
        if name not in config and name != "reparam":
            raise UserError(f"{name} is missing")
        if not is_sound(config.get(name)):
            raise UserError(f"{name} cannot be {config.get(name)!r}")


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


def model_name(name):
    """How a prefix file records its base: a directory absolute, anything else by its name."""
    return name if name == "demo" or not Path(name).is_dir() else str(Path(name).resolve())


def data_paths(paths):
    """The files to read: those given, with "demo" (and None) standing for the sample corpus."""
    return [str(DEMO_CORPUS) if path == "demo" else path for path in paths or ["demo"]]


def data_names(paths):
    """How a run records its files: absolute, but the sample corpus by its name, wherever the project lies."""
    return ["demo" if Path(path).resolve() == DEMO_CORPUS.resolve() else str(Path(path).resolve()) for path in paths]
