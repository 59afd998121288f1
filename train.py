"""Learn one bank of slots per language for a frozen GPT-2.

python train.py --prefix-len 10                                     the demo checkpoint and corpus, on any machine
python train.py --prefix-len 10 --model gpt2-xl --data en-fr.csv    full size, one GPU
"""

import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from minigpt import UserError
from minigpt.files import locked, remove_leftovers
from prefix import cli, distributed, run
from prefix.cli import float_range, int_at_least
from prefix.data import corpus as data
from prefix.distributed import log
from prefix.init import INITS, initial_banks
from prefix.state import METRICS
from prefix.trainer import SECONDS, Settings, Trainer


def parse_arguments():
    parser = cli.Parser(prog="train.py", description="Learn one bank of slots per language for a frozen GPT-2.")
    parser.add_argument("--prefix-len", type=int_at_least(1), default=10, metavar="N", help="slots in each bank (10)")
    parser.add_argument("--model", help="a directory, demo, or a published name such as gpt2-xl")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="CSV, TSV, JSON lines, or one text file per column")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", help="columns to use, each the name of a bank (the first two)"
    )
    parser.add_argument("--limit", type=int_at_least(1), metavar="N", help="read no more than N usable pairs")
    parser.add_argument("--steps", type=int_at_least(1), metavar="N", help="optimizer steps (demo: 300, else 2048)")
    parser.add_argument(
        "--batch-size", type=int_at_least(1), default=64, metavar="PAIRS", help="pairs per optimizer step (64)"
    )
    parser.add_argument("--lr", type=float_range(0, 100, open_low=True), metavar="X", help="peak learning rate (by --init)")
    parser.add_argument(
        "--warmup", type=int_at_least(0), metavar="N", help="steps of linear warm-up (a twentieth of the steps)"
    )
    parser.add_argument("--max-tokens", type=int_at_least(3), default=384, metavar="N", help="longest pair, in tokens (384)")
    parser.add_argument(
        "--init",
        choices=INITS,
        default="text",
        help="slots start as keys and values of real sentences, at random, or so that they change nothing (text)",
    )
    parser.add_argument(
        "--reparam", action="store_true", help="train slots through Li and Liang's MLP, which is not in the prefix file"
    )
    parser.add_argument(
        "--slot-dropout", type=float_range(0, 0.99), default=0.0, metavar="P", help="leave out each slot of a step so often"
    )
    parser.add_argument(
        "--label-smoothing", type=float_range(0, 0.99), default=0.0, metavar="E", help="of the training loss (0)"
    )
    parser.add_argument(
        "--position-offset",
        choices=["0", "prefix"],
        default="0",
        help="where text starts (0); prefix: after as many positions as there are slots, as in peft",
    )
    parser.add_argument("--seed", type=int_at_least(0), default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (runs/<time>)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run in DIR; --steps, --save-every and the machine's options may be new: --device, --dtype, "
        "--attention, --checkpoint-activations, --micro-batch-tokens",
    )
    parser.add_argument("--eval-every", type=int_at_least(0), metavar="N", help="steps between validations; 0: never")
    parser.add_argument(
        "--save-every", type=interval, metavar="N", help="steps between saves of last/ (50), or seconds, such as 60s"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=int_at_least(1), metavar="N", help="tokens in memory at a time (by device)"
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    cli.add_machine_options(parser)
    args = parser.parse_args()
    if args.resume:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        fixed = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", *run.FREE, *run.MACHINE)]
        if fixed:
            parser.error(f"--resume goes on with the run's own settings: {', '.join(fixed)} cannot be new")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    config = run.resume_config(args) if args.resume else run.resolve(args)
    model, tokenizer = cli.load_model(args, config["model"])
    model.checkpoint_activations = args.checkpoint_activations
    longest = min(config["max_tokens"], model.config.n_positions - config["position_offset"])
    if longest < 3:
        raise UserError(
            f"--position-offset prefix: {config['position_offset']} positions for the slots leave too few for text "
            f"in this model's context of {model.config.n_positions}"
        )
    paths = run.data_paths(config["data"])
    corpus = distributed.rank0_first(
        lambda: data.load(paths, config["columns"], tokenizer, config["limit"], longest)
    )
    for line in corpus.report:
        log(line)
    micro_batch_tokens = args.micro_batch_tokens or config["machine"].get("micro_batch_tokens")
    banks = initial_banks(config, model, tokenizer, corpus)
    banks.position_offset = config["position_offset"]
    banks.training_record = {name: config[name] for name in ("model", "data", "columns", "limit", "init")}
    banks.training_record["reparam"] = config.get("reparam", False)
    banks.training_record["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    out = args.resume or distributed.broadcast(run.make_directory(args.out) if distributed.rank() == 0 else None)
    with locked(out / METRICS) if distributed.rank() == 0 else nullcontext():
        trainer = Trainer(model, tokenizer, banks, corpus, Settings(**config["settings"]), out, micro_batch_tokens)
        if args.resume:
            trainer.resume(args.micro_batch_tokens)
        if distributed.rank() == 0:
            if not args.resume:
                run.check_unused(out)  # again: another run may have been faster
            for folder in (out, out / "last"):
                remove_leftovers(folder)
            run.write_config(out, config)
        names, n = ", ".join(banks.names), len(trainer.train_set)
        log(f"Training {names} on {n:,} examples, {model.device}, {model.dtype}, {out}")
        train(trainer)
    log(closing_line(trainer, model, out))


def train(trainer):
    """Train to the end; a stop by a signal or an error says how to go on."""
    to_go_on = f"python train.py --resume {shlex.quote(str(trainer.out))}"
    try:
        finished = trainer.run()
    except UserError as error:
        if not trainer.state.exists():
            raise
        raise UserError(f"{error}; to go on from step {trainer.saved_step}: {to_go_on}") from error
    if not finished:
        log(f"stopped after step {trainer.step}; to go on: {to_go_on}")
    if distributed.rank() == 0:
        from prefix.evaluation.report import (
            draw_loss,  # here, because it takes a while to import
        )

        draw_loss(trainer.out)
    if not finished:
        sys.exit(128 + (trainer.stop[0] if trainer.stop else signal.SIGTERM))


def interval(text):
    """An argparse type: a number of steps, or of seconds such as 60s."""
    return text if SECONDS.fullmatch(text) else int_at_least(1)(text)


def closing_line(trainer, model, out):
    trained = sum(p.numel() for p in trainer.trained)
    share = trained / sum(p.numel() for p in model.parameters())
    good = f"validation loss {trainer.best:.4f}" if trainer.best < float("inf") else "not validated"
    skipped = f"; {trainer.skipped} steps were not finite and skipped" if trainer.skipped else ""
    where = shlex.quote(str(out))
    reads_french = trainer.banks.names[1:2] == ["fr"]  # translate.py does, unless told otherwise
    to_try = f'translate.py --prefix {where} "Bonjour"' if reads_french else f"evaluate.py --prefix {where}"
    return (
        f"Trained {trained:,} parameters ({share:.2%} of the model) in {trainer.seconds:.0f} s "
        f"({trainer.tokens / max(trainer.seconds, 1e-3):,.0f} tokens/s): {good}{skipped}; {out}/prefix.safetensors. "
        f"Try: python {to_try}"
    )


if __name__ == "__main__":
    with cli.cli_errors():
        main()
