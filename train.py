"""Learn one bank of slots per language for a frozen GPT-2.

python train.py --prefix-len 10                                     the demo checkpoint and corpus, on any machine
python train.py --prefix-len 10 --model gpt2-xl --data en-fr.csv    full size, one GPU
"""

import json
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from minigpt import UserError, checkpoint
from minigpt.files import TEMPORARY, locked, read_object, remove_leftovers, replacing
from prefix import command, data, distributed, rows
from prefix.banks import Banks
from prefix.command import notice, number, whole
from prefix.reparam import Reparametrised
from prefix.trainer import METRICS, SECONDS, Settings, Trainer, n_tokens
from prefix.translation import pack, separator

# What suits the base: the demo learns in two minutes on a CPU, a published model takes the notebook's 2,048 steps.
# The demo's learning rates come from a sweep (tests/benchmarks/RESULTS.md); those of published models are not measured.
STEPS = {"demo": 300, "published": 2048}
LR = {
    "demo": {"text": 0.1, "random": 0.1, "zero-effect": 0.1, "reparam": 0.003},
    "published": {"text": 0.01, "random": 0.03, "zero-effect": 0.03, "reparam": 0.001},
}
INITS = ("text", "random", "zero-effect")
QUERIES = 8192  # tokens that --init zero-effect reads
# Options that may be new when a run goes on.
FREE = ("steps", "save_every")
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
    parser.add_argument(
        "--init",
        choices=INITS,
        default="text",
        help="slots start as keys and values of real sentences, at random, or so that they change nothing (text)",
    )
    parser.add_argument("--reparam", action="store_true", help="train slots through Li and Liang's MLP, kept nowhere")
    parser.add_argument(
        "--slot-dropout", type=number(0, 0.99), default=0.0, metavar="P", help="leave out each slot of a step so often"
    )
    parser.add_argument(
        "--label-smoothing", type=number(0, 0.99), default=0.0, metavar="E", help="of the training loss (0)"
    )
    parser.add_argument(
        "--position-offset",
        choices=["0", "prefix"],
        default="0",
        help="where text starts (0); prefix: after as many positions as there are slots, as in peft",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (runs/<time>)")
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in DIR; --steps, --save-every may be new"
    )
    parser.add_argument("--eval-every", type=whole(0), metavar="N", help="steps between validations; 0: never")
    parser.add_argument(
        "--save-every", type=interval, metavar="N", help="steps between saves of last/ (50), or seconds, such as 60s"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=whole(1), metavar="N", help="tokens in memory at a time (by device)"
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    command.add_machine_options(parser)
    args = parser.parse_args()
    if args.resume:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        fixed = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", *FREE, *MACHINE)]
        if fixed:
            parser.error(f"--resume goes on with the run's own settings: {', '.join(fixed)} cannot be new")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    config = resume_config(args) if args.resume else resolve(args)
    model, tokenizer = command.load_model(args, config["model"])
    model.checkpoint_activations = args.checkpoint_activations
    longest = min(config["max_tokens"], model.config.n_positions - config["position_offset"])
    if longest < 3:
        raise UserError(
            f"--position-offset prefix: {config['position_offset']} positions for the slots leave too few for text "
            f"in this model's context of {model.config.n_positions}"
        )
    paths = command.data_paths(config["data"])
    corpus = distributed.first_then_others(
        lambda: data.load(paths, config["columns"], tokenizer, config["limit"], longest)
    )
    for line in corpus.report:
        notice(line)
    settings = Settings(**config["settings"] | {"micro_batch_tokens": args.micro_batch_tokens})
    banks = start(config, model, tokenizer, corpus)
    banks.position_offset = config["position_offset"]
    banks.training_record = {name: config[name] for name in ("model", "data", "columns", "limit", "init")}
    banks.training_record["reparam"] = config.get("reparam", False)
    banks.training_record["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out = args.resume or distributed.from_first(make_run_directory(args.out) if distributed.rank() == 0 else None)
    with locked(out / METRICS) if distributed.rank() == 0 else nullcontext():
        trainer = Trainer(model, tokenizer, banks, corpus, settings, out)
        if args.resume:
            trainer.resume()
        if distributed.rank() == 0:
            if not args.resume:
                check_unused(out)  # again: another run may have been faster
            for folder in (out, out / "last"):
                remove_leftovers(folder)
            write_config(out, config)
        names, n = ", ".join(banks.names), len(trainer.train_set)
        notice(f"Training {names} on {n:,} examples, {model.device}, {model.dtype}, {out}")
        run(trainer)
    notice(closing_line(trainer, model, out))


def run(trainer):
    """Train to the end; a stop by a signal or an error says how to go on."""
    to_go_on = f"python train.py --resume {shlex.quote(str(trainer.out))}"
    try:
        finished = trainer.run()
    except UserError as error:
        if not trainer.can_go_on():
            raise
        raise UserError(f"{error}; to go on from step {trainer.saved_step}: {to_go_on}") from error
    if not finished:
        notice(f"stopped after step {trainer.step}; to go on: {to_go_on}")
    if distributed.rank() == 0:
        from prefix.report import draw_loss  # here, because it takes a while to import

        draw_loss(trainer.out)
    if not finished:
        sys.exit(128 + (trainer.stop[0] if trainer.stop else signal.SIGTERM))


def resolve(args):
    """The command with its defaults filled in: what config.json keeps and --resume reads."""
    check_unused(args.out)
    name = args.model or checkpoint.default()
    demo = checkpoint.find(name).resolve() == checkpoint.DEMO.resolve()
    paths = command.data_paths(args.data)
    steps = args.steps or STEPS["demo" if demo else "published"]
    settings = Settings(
        steps=steps,
        lr=args.lr or LR["demo" if demo else "published"]["reparam" if args.reparam else args.init],
        batch_size=args.batch_size,
        warmup=steps // 20 if args.warmup is None else args.warmup,
        eval_every=max(1, steps // 6) if args.eval_every is None else args.eval_every,
        save_every=args.save_every or 50,
        seed=args.seed,
        slot_dropout=args.slot_dropout,
        label_smoothing=args.label_smoothing,
    )
    return {
        "model": command.model_name(name),
        "data": command.data_names(paths),
        "columns": list(rows.resolve_columns(paths, args.columns)),
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
        Settings(**config["settings"] | {"micro_batch_tokens": config["machine"].get("micro_batch_tokens")})
    except (UserError, TypeError) as error:  # a TypeError: a setting that Settings does not have, or lacks
        raise UserError(f"{path} is not the config of a run: {error}") from error
    for name in MACHINE:
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
        "prefix_len": lambda value: is_whole(value, 1),
        "position_offset": lambda value: is_whole(value, 0),
        "settings": lambda value: isinstance(value, dict),
        "machine": lambda value: isinstance(value, dict)
        and all(value.get(name, "auto") in choices for name, choices in command.CHOICES.items())
        and value.get("checkpoint_activations", False) in (False, True),
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


def interval(text):
    """An argparse type: a number of steps, or of seconds such as 60s."""
    return text if SECONDS.fullmatch(text) else whole(1)(text)


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
    """The slots before the first step: random, read off the corpus's own sentences in each language, or where its
    pairs do not look; behind the network that moves them, where there is to be one."""
    names, prefix_len, seed = corpus.columns, config["prefix_len"], config["settings"]["seed"]
    ids = {name: opening(corpus, column, prefix_len) for column, name in enumerate(names)}
    if config["init"] == "random":
        banks = Banks.random(model.config, names, prefix_len, seed)
    elif config["init"] == "zero-effect":
        batch = some_pairs(model, tokenizer, corpus)
        banks = Banks.zero_effect(model, batch.ids, batch.layout, names, prefix_len, seed)
    else:
        banks = Banks.from_text(model, ids, prefix_len)
    return (Reparametrised(banks, seed) if config.get("reparam") else banks).to(model.device)


def some_pairs(model, tokenizer, corpus):
    """The first training pairs, in every direction, packed: QUERIES tokens or a few more."""
    examples, n = [], 0
    for row, s, t in corpus.examples("train"):
        examples.append((corpus.ids(row, s), corpus.ids(row, t), int(s), int(t)))
        n += n_tokens(examples[-1])
        if n >= QUERIES:
            break
    return pack(examples, separator(tokenizer), tokenizer.eot, model.device)


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
    trained = sum(p.numel() for p in trainer.trained)
    share = trained / sum(p.numel() for p in model.parameters())
    good = f"validation loss {trainer.best:.4f}" if trainer.best < float("inf") else "not validated"
    skipped = f"; {trainer.skipped} steps were not finite and skipped" if trainer.skipped else ""
    return (
        f"Trained {trained:,} parameters ({share:.2%} of the model) in {trainer.seconds:.0f} s "
        f"({trainer.tokens / max(trainer.seconds, 1e-3):,.0f} tokens/s): {good}{skipped}; {out}/prefix.safetensors. "
        f'Try: python translate.py --prefix {shlex.quote(str(out))} "Bonjour"'
    )


if __name__ == "__main__":
    with command.telling_errors():
        main()
