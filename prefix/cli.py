"""What the three commands share: options, what they load, and how a user's mistake is told.

Imported by scripts and by the `__main__` part of modules, and by nothing else.
"""

import argparse
import os
import signal
import sys
from contextlib import contextmanager, suppress

import torch

from minigpt import GPT, Tokenizer, UserError
from minigpt.files import escape_control
from minigpt.memory import out_of_memory
from minigpt.quantize import fastest_product, multiplies_bf16, prepack, quantize
from prefix import prefix_file
from prefix.banks import Banks
from prefix.distributed import log
from prefix.run import DEMO_PREFIX, data_paths, newest_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line for a mistake."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {escape_control(message)} (--help lists the options)\n")


@contextmanager
def cli_errors():
    """A UserError, a full disk or too little memory becomes one line on standard error and exit code 2; Ctrl-C a quiet
    130. Standard output is UTF-8, as standard input is, whatever the locale says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(AttributeError):  # a notebook's standard output is no file
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # as paths are read
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away, and what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        if getattr(error, "filename", None):  # and no number, as str(error) has it
            error = f"{error.filename}: {error.strerror}"
        print(f"error: {(str(error) or 'out of memory').splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def add_machine_options(parser):
    group = parser.add_argument_group("machine")
    option = lambda name, choices, text: group.add_argument(name, choices=["auto", *choices], default="auto", help=text)
    option("--device", ["cpu", "cuda", "mps"], "where to compute (auto: a GPU if there is one)")
    option("--dtype", DTYPES, "what the frozen model computes in (auto: 16 bits on a GPU, else float32)")
    text = "fused: the fast kernels, or an error; plain: the formula, to compare with (auto)"
    option("--attention", ["fused", "plain"], text)


def add_weights_option(parser):
    parser.add_argument("--weights", choices=["int8"], help="8 bits to multiply with, faster on a CPU (as --dtype says)")


def add_prefix_option(parser):
    text = "given several times, the banks of all of them (the newest run, else the demo prefix)"
    parser.add_argument("--prefix", action="append", metavar="FILE_OR_RUN", help=text)


def int_at_least(least, most=None):
    """An argparse type: a whole number from `least` to `most`, or of any size that 64 bits hold."""
    inside = lambda value: least <= value <= (most or 2**63 - 1)
    return number(int, inside, f"a whole number from {least} to {most:,}" if most else f"a whole number of {least} or more")


def float_range(least, most, open_low=False):
    """An argparse type: a number from `least` to `most`, `least` itself left out if open_low."""
    inside = lambda value: least <= value <= most and not (open_low and value == least)
    return number(float, inside, f"a number {'above' if open_low else 'from'} {least} to {most}")


def number(kind, inside, words):
    def parse(text):
        with suppress(ValueError):
            if inside(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


def load_model(args, name):
    """The frozen model and its tokenizer, where and as the machine options say."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(filter(there.get, there)) if args.device == "auto" else args.device
    if not there[device]:
        raise UserError(f"--device {device}: torch sees no {device.upper()} device here; use --device cpu")
    dtype = DTYPES.get(args.dtype, torch.float32)
    if args.dtype == "auto" and device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    model = GPT.from_pretrained(name, device, dtype)
    model.attention = args.attention
    tokenizer = Tokenizer.from_pretrained(name)
    if tokenizer.n_vocab > model.config.vocab_size:
        ids = f"the tokenizer's ids go up to {tokenizer.n_vocab - 1}"
        raise UserError(f"{name}: {ids}, but config.json has vocab_size {model.config.vocab_size}")
    return model, tokenizer


def load_with_base(args):
    """The options of a script that uses a prefix -> (model, tokenizer, banks, paths of the prefix files). The banks of
    several files are one Banks. Without --prefix: the newest run with the banks that are named, else the demo's."""
    needs = {args.source, args.target, *(getattr(args, "columns", None) or [])} - {None}
    if args.prefix:
        paths = [prefix_file.find(path) for path in args.prefix]
    else:
        paths = [newest_run(needs) or DEMO_PREFIX]
        log(f"Using the prefix {paths[0]}")
    name = args.model or prefix_file.read_header(paths[0])["training"].get("model")
    if not name:
        raise UserError(f"{paths[0]} does not say which model it was trained on: name it with --model")
    if args.weights:
        if args.dtype not in ("auto", "float32") or args.device not in ("auto", "cpu"):
            raise UserError(f"--weights {args.weights} is for a CPU, in float32: leave out --dtype and --device")
        args.device, args.dtype = "cpu", "float32"
    model, tokenizer = load_model(args, name)
    if model.device.type == "cpu":
        reform(model, args.weights)
    return model, tokenizer, joined([(path, Banks.load(path, model)) for path in paths]), paths


def joined(parts):
    """The banks of several prefix files of one base, as one Banks. parts: [(path, Banks)]. Raises UserError where they
    disagree on position_offset, or where two have a bank of the same name."""
    (first, one), banks, owner = parts[0], {}, {}
    for path, part in parts:
        if part.position_offset != one.position_offset:
            offsets = f"{part.position_offset} in {path}, {one.position_offset} in {first}"
            raise UserError(f"prefixes go together only where text starts at the same position: {offsets}")
        for name, key_value in zip(part.names, part.key_values()):
            if name in banks:
                raise UserError(f"bank {name!r} is there twice, in {owner[name]} and in {path}: leave one out")
            banks[name], owner[name] = key_value, path
    return Banks(banks, one.position_offset, one.training_record)


def reform(model, weights):
    """The form of the weights in which this CPU decodes fastest, at --dtype and --weights as asked for."""
    if weights:
        if product := fastest_product(model):
            quantize(model, product)
        log(f"8 bits: {f'multiplied by {product.__name__}' if product else 'torch has no product for this CPU; float32'}")
        return
    prepack(model)
    if model.dtype == torch.bfloat16 and not multiplies_bf16():
        log("This CPU has no instructions for bfloat16: --dtype float32 is many times as fast")


def direction(args, banks):
    """(source, target) bank names: --from and --to, by default the second bank to the first."""
    names = banks.names
    if len(names) < 2:
        raise UserError(f"this prefix has one bank, {names[0]}; translating takes two: name another file, --prefix, too")
    target = args.target or next(name for name in names if name != args.source)
    source = args.source or next(name for name in [names[1], *names] if name != target)
    banks.mask([source, target])  # both are there
    if source == target:
        raise UserError(f"--from {source} --to {target}: the same bank twice")
    return source, target


def text_of(args, prefixes):
    """The files that --data names, else those that these prefixes were trained on -> (paths, columns, rows): of the
    training's own files the columns and the number of rows that it read; of others None, None."""
    record = prefix_file.read_header(prefixes[0])["training"]
    paths, trained = data_paths(args.data or data_of(prefixes)), data_paths(record.get("data"))
    same = [*map(os.path.realpath, paths)] == [*map(os.path.realpath, trained)]
    firsts = {(prefix_file.read_header(path)["training"].get("columns") or [None])[0] for path in prefixes}
    if same and len(firsts) > 1:  # a row's split goes by its first column
        raise UserError(f"{', '.join(map(str, prefixes))} held out other sentences of {paths[0]}: use one of them at a time")
    return paths, *(record.get(name) if same else None for name in ("columns", "limit"))


def data_of(prefixes):
    """The files that these prefixes were trained on. Raises UserError where they do not say, or differ."""
    records = [prefix_file.read_header(path)["training"].get("data") for path in prefixes]
    if not records[0] or any(files != records[0] for files in records):
        raise UserError(f"{', '.join(map(str, prefixes))}: no one text that they were trained on: name some with --data")
    return records[0]
