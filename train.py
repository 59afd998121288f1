"""Learn one bank of slots per language for a frozen GPT-2.

python train.py --prefix-len 10                                     the demo checkpoint and corpus, on any machine
python train.py --prefix-len 10 --model gpt2-xl --data en-fr.csv    full size, one GPU
"""

import argparse
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli_errors: no traceback of what is still being imported

import torch

from minigpt import UserError
from minigpt.memory import tokens_that_fit
from prefix import cli, distributed, run, state
from prefix.batches import MICRO_BATCH_TOKENS, BatchLoader
from prefix.cli import float_range, int_at_least
from prefix.data import corpus as data
from prefix.distributed import log
from prefix.dry_run import dry_run
from prefix.evaluation.pictures import draw_loss
from prefix.init import INITS, initial_banks
from prefix.rates import try_rates
from prefix.trainer import NotFinite, Settings, Trainer

MAX_SLOTS = 1 << 12  # of a bank: more than any published context has positions, less than fills a machine's memory
MAX_BATCH = 1 << 20  # pairs, whose list is in memory
FAR = 30  # units: at the best rate of each base slots moved by 1 to 17, and where they moved by more it was worse


def main():
    args = parse_arguments()
    distributed.start(args.device)
    config = run.resume_config(args) if args.resume else run.resolve(args)
    directions, lr = run.directions(config), config["settings"]["lr"]
    rates = lr if isinstance(lr, list) else [lr]
    model, tokenizer = cli.load_model(args, config["model"])
    model.checkpoint_activations = args.checkpoint_activations
    corpus = load_corpus(config, model, tokenizer)
    micro_batch_tokens = args.micro_batch_tokens or config["machine"].get("micro_batch_tokens")
    micro_batch_tokens = micro_batch_tokens or tokens_that_fit(model, MICRO_BATCH_TOKENS[model.device.type])

    def make_trainer(lr, out=None):
        banks, settings = make_banks(config, model, tokenizer, corpus), Settings(**config["settings"] | {"lr": lr})
        loader = BatchLoader(corpus, tokenizer, settings, model.device, directions, micro_batch_tokens)
        return Trainer(model, banks, loader, settings, out)

    trainer = make_trainer(rates[0])  # before the run directory, so that a mistake leaves none
    if len(rates) > 1 and not len(trainer.loader.validation):
        raise UserError("several --lr are compared on validation pairs, and there are none: give one --lr")
    if args.dry_run:
        dry_run(trainer, directions, len(rates))
        return distributed.finish()
    with run.directory(args.out, args.resume) as out:
        trainer.out = out
        if len(rates) == 1:
            trainer.resume()  # where there is a run
        if args.micro_batch_tokens:  # whatever ran out of memory before
            trainer.loader.micro_batch_tokens = args.micro_batch_tokens
        if len(rates) == 1 or not args.resume:  # else the trials say first whether they can go on so
            run.write_config(out, config)
        if (began := trainer.progress.step) < trainer.settings.steps:
            trained = ", ".join(config["train_banks"] or config["columns"])
            log(f"Training {trained} on {len(trainer.loader.train):,} examples, {model.device}, {model.dtype}, {out}")
        with resumable(out):
            if len(rates) > 1:
                trainer = try_rates(rates, make_trainer, out)
                config["settings"]["lr"] = lr if trainer.stopped else trainer.settings.lr
                run.write_config(out, config)
            finished = not trainer.stopped and trainer.run()
        if distributed.rank() == 0:
            draw_loss(trainer.out)
    log(closing_line(trainer, model, began) if finished else f"stopped after step {trainer.progress.step}; {to_go_on(out)}")
    distributed.finish()
    if not finished:
        sys.exit(128 + (trainer.stop[0] if trainer.stop else signal.SIGTERM))


def load_corpus(config, model, tokenizer):
    room = model.config.n_positions - config["position_offset"]
    if room < 3:
        raise UserError(f"--position-offset prefix leaves {room} positions, too few for text: lower --prefix-len")
    paths, longest = run.data_paths(config["data"]), min(config["max_tokens"], room)
    corpus = distributed.rank0_first(lambda: data.load(paths, config["columns"], tokenizer, config["limit"], longest))
    for line in corpus.report:
        log(line)
    return corpus


def make_banks(config, model, tokenizer, corpus):
    """The banks where they start, with the record that their file keeps; those not to be trained are frozen."""
    banks = initial_banks(config, model, tokenizer, corpus)
    names = ("model", "data", "columns", "limit", "init", "reparam", "pairs", "from_prefix", "train_banks")
    banks.training_record = {name: config[name] for name in names}
    banks.training_record["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    return banks


@contextmanager
def resumable(out):
    """Inside, an error says how to go on, where that can help."""
    try:
        yield
    except UserError as error:
        if isinstance(error, NotFinite) or not any(map(Path.exists, map(state.state_file, [out, *out.glob("lr-*")]))):
            raise
        raise UserError(f"{error}; {to_go_on(out)}") from error


def to_go_on(out):
    return f"to go on: python train.py --resume {shlex.quote(str(out))}"


def warning(progress, moved):
    """What went wrong and what to try: a line of its own, or nothing."""
    base, best, far = progress.base_loss, progress.best, moved.get("moved_max", 0)
    if base is not None and not best < base:
        return f"Warning: validation loss {best:.2f} is no better than the base's. Try a third of --lr, or more --steps\n"
    if far > FAR:
        return f"Warning: a slot moved by {far:.0f} units of the base's keys and values, more than {FAR}. Try a third of --lr\n"
    return ""


def closing_line(trainer, model, began):
    """What a run came to that began, or went on, at that step, behind a warning where it went wrong."""
    p, out, trained = trainer.progress, trainer.out, sum(parameter.numel() for parameter in trainer.trainable)
    if began == p.step:
        return f"{out} is finished, all {p.step:,} steps are done; {to_go_on(out)} --steps N"
    fraction = trained / sum(parameter.numel() for parameter in model.parameters())
    pace = f"in {p.seconds:.0f} s ({p.tokens / max(p.seconds, 1e-3):,.0f} tokens/s)"
    good = "not validated" if p.base_loss is None else f"validation loss {p.best:.4f} ({p.base_loss:.4f} without the prefix)"
    skipped = f"; {p.skipped} steps were not finite and skipped" if p.skipped else ""
    result = f"Trained {trained:,} parameters ({fraction:.2%} of the model) {pace}: {good}{skipped}"
    script = "evaluate.py" if len(trainer.loader.corpus.examples("test")) else "translate.py"
    result = warning(p, trainer.banks.moved()) + result
    return f"{result}; {out}/prefix.safetensors. Try: python {script} --prefix {shlex.quote(str(out))}"


def parse_arguments():
    parser = cli.Parser(prog="train.py", description="Learn one bank of slots per language for a frozen GPT-2.")
    add_options(parser)
    args = parser.parse_args()
    if args.reparam and (args.train_banks or args.from_prefix):
        parser.error("--reparam moves all banks from a start of its own: not with --from-prefix or --train-banks")
    if args.resume:
        given = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args)))))  # None: not given
        given = [name for name, value in given.items() if value is not None]
        fixed = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", *run.FREE, *run.MACHINE)]
        if fixed:
            parser.error(f"--resume goes on with the run's own settings: {', '.join(fixed)} cannot be new")
    return args


def add_options(parser):
    n = lambda least, most=None: {"type": int_at_least(least, most), "metavar": "N"}
    add = parser.add_argument_group("what is learned, from what").add_argument
    add("--prefix-len", **n(1, MAX_SLOTS), default=10, help="slots in each bank (10)")
    add("--model", help="a directory, demo, or a published name such as gpt2 (gpt2-xl if it is on disk, else demo)")
    add("--data", nargs="+", metavar="FILE", help="CSV, TSV, JSON lines, or a text file per column (the sample corpus)")
    add("--columns", nargs="+", metavar="NAME", help="to use, each names a bank (both of two, else the first two languages)")
    pair = cli.number(str, lambda text: all(text.partition(":")), "a pair SOURCE:TARGET")
    add("--pairs", nargs="+", type=pair, metavar="SOURCE:TARGET", help="directions to train (all that occur)")
    add("--limit", **n(1), help="read no more than N usable rows (all)")
    add("--max-tokens", **n(3), default=384, help="longest pair, in tokens (384)")
    add("--init", choices=INITS, default="text", help="slots start as real text, at random, or without effect (text)")
    add("--from-prefix", metavar="FILE_OR_RUN", help="banks that this prefix has start as they are there (none)")
    add("--train-banks", nargs="+", metavar="NAME", help="others stay as --from-prefix has them (all)")
    text = "where text starts (0); prefix: after as many positions as there are slots, as in peft"
    add("--position-offset", choices=["0", "prefix"], default="0", help=text)

    add = parser.add_argument_group("how it is learned").add_argument
    add("--steps", **n(1), help="optimizer steps (demo: 300, else 2048)")
    add("--batch-size", **n(1, MAX_BATCH), default=64, help="pairs per optimizer step (64)")
    text = "peak learning rate (0.3; 0.003 with --reparam); of several, the best after a tenth of the steps goes on"
    add("--lr", nargs="+", type=float_range(0, 100, open_low=True), metavar="X", help=text)
    add("--warmup", **n(0), help="steps of linear warm-up (a twentieth of the steps)")
    add("--reparam", action="store_true", help="train slots through Li and Liang's MLP, for the training only (off)")
    add("--seed", **n(0), default=0, help="of the order and of random starts (0)")
    add("--out", type=Path, metavar="DIR", help="the run directory (runs/<time>)")
    add("--resume", type=Path, metavar="DIR", help="go on with this run; only its length and the machine may be new (none)")
    add("--dry-run", action="store_true", help="say what a run would take, from one timed micro-batch (off)")
    add("--eval-every", **n(0), help="steps between validations (a sixth); 0: never")
    add("--save-every", **n(1), help="steps between saves of last/ (50)")

    add = parser.add_argument_group("memory").add_argument
    add("--micro-batch-tokens", **n(1), help="in memory at a time, halved until they fit (CPU: 1024, MPS: 2048, GPU: 16384)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time (off)")
    cli.add_machine_options(parser)


if __name__ == "__main__":
    with cli.cli_errors():
        main()
