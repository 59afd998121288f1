"""Translate with a learned prefix.

python translate.py "Bonjour"                       one translation per argument
python translate.py --from en --to fr < lines.txt   one per line of standard input, in order
"""

import os
import signal
import sys
from collections import Counter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli_errors: no traceback of what is still being imported

from tqdm import tqdm

from minigpt import UserError
from minigpt.generate import Sampler
from prefix import cli, distributed
from prefix.cli import float_range, int_at_least
from prefix.distributed import log, printable
from prefix.lines import decode_line, lines_as_they_come
from prefix.translation import Decoding, translate

MAX_BATCH = 1 << 16  # sentences


def parse_arguments():
    parser = cli.Parser(prog="translate.py", description="Translate with a learned prefix.")
    add_options(parser)
    args = parser.parse_args()
    sampling = bool(args.top_k or args.top_p < 1)
    if args.temperature is None:
        args.temperature = float(sampling)
    sampling = sampling or args.temperature > 0
    other = "--beam, --temperature, --top-k or --top-p"
    for wrong, message in (
        (not args.text and sys.stdin is None, "no text, and standard input is closed"),
        (args.length_penalty is not None and args.beam == 1, "--length-penalty goes with --beam"),
        (args.beam > 1 and sampling, "--beam does not go with --temperature, --top-k or --top-p"),
        (args.choices and (args.beam > 1 or sampling), f"--choices does not go with {other}"),
        (not all(choice.strip() for choice in args.choices or []), "--choices: an answer is empty"),
    ):
        if wrong:
            parser.error(message)
    return args


def add_options(parser):
    add = parser.add_argument
    add("text", nargs="*", help="sentences; put -- before one that begins with a dash (the lines of standard input)")
    add("--from", dest="source", metavar="BANK", help="source (the second bank, or the first that is not --to)")
    add("--to", dest="target", metavar="BANK", help="target (the first bank that is not --from)")
    cli.add_prefix_option(parser)
    add("--model", metavar="M", help="where the base is (where the prefix file says)")
    group = parser.add_argument_group("decoding", "Without these, each token is the likeliest one.")
    for name, kind, default, metavar, text in (
        ("beam", int_at_least(1), 1, "N", "beam search with N beams (1: none)"),
        ("length-penalty", float_range(-10, 10), None, "X", "beams are ranked by log p / length ** X (1.0)"),
        ("temperature", float_range(0, 100), None, "X", "of samples (0: the likeliest; 1 with --top-k or --top-p)"),
        ("top-k", int_at_least(0), 0, "N", "sample among the N likeliest (0: all)"),
        ("top-p", float_range(0, 1, open_low=True), 1.0, "X", "sample in this part of all probability (1.0)"),
        ("seed", int_at_least(0), 0, "N", "of the samples (0)"),
        ("max-new-tokens", int_at_least(1), None, "N", "of an answer (twice the source plus 16)"),
        ("batch-size", int_at_least(1, MAX_BATCH), 32, "N", "sentences decoded at a time (32)"),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    text = "answer with the likeliest of these; put it behind the text (any answer)"
    group.add_argument("--choices", nargs="+", metavar="ANSWER", help=text)
    cli.add_machine_options(parser)
    cli.add_weights_option(parser)


def main():
    args = parse_arguments()
    distributed.start(args.device)
    model, tokenizer, banks, _ = cli.load_with_base(args)
    source, target = cli.direction(args, banks)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    decoding = Decoding(args.max_new_tokens, sampler, args.beam, penalty, args.batch_size, args.choices)
    decoding.check(model.config)
    log(f"Translating {source} to {target}" + ("" if args.text else ", line by line from standard input"))
    chunks = iter([[os.fsencode(text) for text in args.text]]) if args.text else lines_as_they_come(args.batch_size)
    first, counts = distributed.rank() == 0, Counter()
    quiet = args.text or not first or sys.stdout.isatty() or not sys.stderr.isatty()
    with tqdm(unit=" lines", disable=quiet, file=sys.stderr) as bar:
        while chunk := distributed.broadcast(next(chunks, None) if first else None):
            texts, faults = zip(*map(decode_line, chunk))
            for result, fault in zip(translate(model, tokenizer, banks, texts, (source, target), decoding), faults):
                decoding.first += 1
                if first:
                    print(printable(result.text), flush=True)
                if fault := fault or result.fault:
                    log(f"line {decoding.first}: {fault}")
                counts["fault"] += bool(fault)
                counts["cut"] += not (result.finished or fault)
                counts["divided"] += result.pieces > 1
            bar.update(len(chunk))
    say_what_was_wrong(counts, decoding.first)
    distributed.finish()


def say_what_was_wrong(counts, n):
    """Raises UserError where one of the n lines has no translation."""
    if counts["divided"]:
        log(f"{counts['divided']} of {n} texts were too long for the model's context: translated sentence by sentence")
    if counts["cut"]:
        log(f"{counts['cut']} of {n} translations were cut at their token limit (--max-new-tokens)")
    if counts["fault"]:
        raise UserError(f"{counts['fault']} of {n} sentences could not be translated: their lines above say why")


if __name__ == "__main__":
    with cli.cli_errors():
        main()
