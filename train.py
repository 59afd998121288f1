"""Learn one bank of slots per language for a frozen GPT-2.

python train.py --prefix-len 10                                     the demo checkpoint and corpus, on any machine
python train.py --prefix-len 10 --model gpt2-xl --data en-fr.csv    full size, one GPU
"""

import json
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from minigpt import UserError, checkpoint
from minigpt.files import replacing
from prefix import command, data, distributed
from prefix.banks import Banks
from prefix.command import notice, number, whole
from prefix.trainer import Settings, Trainer

# What suits the base: the demo learns in two minutes on a CPU, a published model takes the notebook's 2,048 steps.
# The demo's learning rates come from a sweep (tests/benchmarks/RESULTS.md); those of published models are not measured.
STEPS = {"demo": 300, "published": 2048}
LR = {"demo": {"text": 0.1, "random": 0.1}, "published": {"text": 0.01, "random": 0.03}}
# Options that may be new when a run goes on.
MACHINE = ("device", "dtype", "attention", "checkpoint_activations", "micro_batch_tokens")


def parse_arguments():
    parser = command.Parser(prog="train.py", description="Learn one bank of slots per language for a frozen GPT-2.")
    parser.add_argument("--prefix-len", type=whole(1), default=10, metavar="N", help="slots in each bank (10)")
    parser.add_argument("--model", help="a directory, demo, or a published name such as gpt2-xl")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="CSV, TSV, JSON lines, or one text file per column")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="columns to use, each the name of a bank (the first two)"
    )
    parser.add_argument("--limit", type=whole(1), metavar="N", help="read no more than N usable pairs")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="optimizer steps (demo: 300, else 2048)")
    parser.add_argument(
        "--batch-size", type=whole(1), default=64, metavar="PAIRS", help="pairs per optimizer step (64)"
    )
    parser.add_argument("--lr", type=number(0, 100, open_low=True), metavar="X", help="peak learning rate (by --init)")
    parser.add_argument(
        "--warmup", type=whole(0), metavar="N", help="steps of linear warm-up (a twentieth of the steps)"
    )
    parser.add_argument("--max-tokens", type=whole(3), default=384, metavar="N", help="longest pair, in tokens (384)")
    parser.add_argument("--init", choices=["text", "random"], default="text", help="where the slots start")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (runs/<time>)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR; only --steps may be new")
    parser.add_argument("--eval-every", type=whole(0), metavar="N", help="steps between validations; 0: never")
    parser.add_argument(
        "--save-every", type=whole(1), default=50, metavar="N", help="steps between saves of last/ (50)"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=whole(1), metavar="N", help="tokens in memory at a time (by device)"
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    command.add_machine_options(parser)
    args = parser.parse_args()
    if args.resume:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        fixed = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", "steps", *MACHINE)]
        if fixed:
            parser.error(f"--resume goes on with the run's own settings: {', '.join(fixed)} cannot be new")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    config = resume_config(args) if args.resume else resolve(args)
    model, tokenizer = command.load_model(args, config["model"])
    model.checkpoint_activations = args.checkpoint_activations
    longest = min(config["max_tokens"], model.config.n_positions)
    paths = command.data_paths(config["data"])
    corpus = distributed.first_then_others(
        lambda: data.load(paths, config["columns"], tokenizer, config["limit"], longest)
    )
    for line in corpus.skipped:
        notice(line)
    settings = Settings(**config["settings"] | {"micro_batch_tokens": args.micro_batch_tokens})
    banks = start(config, model, tokenizer, corpus)
    banks.training_record = {name: config[name] for name in ("model", "data", "columns", "limit", "init")}
    banks.training_record["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out = args.resume or distributed.from_first(make_run_directory(args.out) if distributed.rank() == 0 else None)
    trainer = Trainer(model, tokenizer, banks, corpus, settings, out)
    if args.resume:
        trainer.resume()
    if distributed.rank() == 0:
        write_config(out, config)
    names, n = ", ".join(banks.names), len(trainer.train_set)
    notice(f"Training {names} on {n:,} examples, {model.device}, {model.dtype}, {out}")
    if not trainer.run():
        notice(f"stopped after step {trainer.step}; to go on: python train.py --resume {shlex.quote(str(out))}")
        sys.exit(128 + (trainer.stop[0] if trainer.stop else signal.SIGTERM))
    notice(closing_line(trainer, model, out))


def resolve(args):
    """The command with its defaults filled in: what config.json keeps and --resume reads."""
    check_unused(args.out)
    name = args.model or checkpoint.default()
    demo = checkpoint.find(name).resolve() == checkpoint.DEMO.resolve()
    paths = command.data_paths(args.data)
    steps = args.steps or STEPS["demo" if demo else "published"]
    settings = Settings(
        steps=steps,
        lr=args.lr or LR["demo" if demo else "published"][args.init],
        batch_size=args.batch_size,
        warmup=steps // 20 if args.warmup is None else args.warmup,
        eval_every=max(1, steps // 6) if args.eval_every is None else args.eval_every,
        save_every=args.save_every,
        seed=args.seed,
    )
    return {
        "model": name if name == "demo" or not Path(name).is_dir() else str(Path(name).resolve()),
        "data": command.data_names(paths),
        "columns": list(data.resolve_columns(paths, args.columns)),
        "limit": args.limit,
        "max_tokens": args.max_tokens,
        "init": args.init,
        "prefix_len": args.prefix_len,
        "settings": vars(settings),
        "machine": {name: getattr(args, name) for name in MACHINE},
    }


def resume_config(args):
    """The run's config. What `args` does not say of the machine is as the run began."""
    path = args.resume / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["settings"]["steps"] = args.steps or config["settings"]["steps"]
        Settings(**config["settings"])
        lacking = {"model", "data", "columns", "limit", "max_tokens", "init", "prefix_len"} - config.keys()
        if lacking:
            raise ValueError(f"{', '.join(sorted(lacking))} missing")
        for name in MACHINE:
            if getattr(args, name) in ("auto", False, None):
                setattr(args, name, config["machine"].get(name))
    except OSError as error:
        raise UserError(f"--resume {args.resume}: {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume {args.resume}: {path} is damaged: {error!r}") from error
    return config


def check_unused(out):
    """A run never writes over what is there."""
    if out and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: the directory is not empty; name another, or go on with --resume {out}")


def make_run_directory(out):
    """`out`, or a new directory named by the time."""
    if out:
        check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    while True:
        try:
            out = command.RUNS / time.strftime("%Y%m%d-%H%M%S")
            out.mkdir(parents=True)
            return out
        except FileExistsError:  # by a run of this same second
            time.sleep(0.1)


def write_config(out, config):
    with replacing(out / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def start(config, model, tokenizer, corpus):
    """The slots before the first step: random, or read off the corpus's own sentences in each language."""
    ids = {name: opening(corpus, column, config["prefix_len"]) for column, name in enumerate(corpus.columns)}
    if config["init"] == "random":
        seed = config["settings"]["seed"]
        return Banks.random(model.config, corpus.columns, config["prefix_len"], seed).to(model.device)
    return Banks.from_text(model, ids, config["prefix_len"])


def opening(corpus, column, n):
    """The first training sentences of a column, until they have n tokens."""
    ids = []
    for row in corpus.rows("train"):
        ids += corpus.ids(row, column).tolist()
        if len(ids) >= n:
            break
    if not ids:
        raise UserError(f"no training pair has a text in the column {corpus.columns[column]!r}: give more data")
    return ids[:n]


def closing_line(trainer, model, out):
    trained = sum(p.numel() for p in trainer.banks.parameters())
    share = trained / sum(p.numel() for p in model.parameters())
    good = f"validation loss {trainer.best:.4f}" if trainer.best < float("inf") else "not validated"
    skipped = f"; {trainer.skipped} steps were not finite and skipped" if trainer.skipped else ""
    return (
        f"Trained {trained:,} parameters ({share:.2%} of the model) in {trainer.seconds:.0f} s "
        f"({trainer.tokens / trainer.seconds:,.0f} tokens/s): {good}{skipped}; {out}/prefix.safetensors. "
        f'Try: python translate.py --prefix {shlex.quote(str(out))} "Bonjour"'
    )


if __name__ == "__main__":
    with command.telling_errors():
        main()
