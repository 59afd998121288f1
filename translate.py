"""Translate with a learned prefix.

python translate.py "Bonjour"                       one translation per argument
python translate.py --from en --to fr < lines.txt   one per line of standard input, in order
"""

import codecs
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli_errors: no traceback of what is still being imported

from tqdm import tqdm

from minigpt import UserError
from minigpt.generate import Sampler
from prefix import cli, distributed
from prefix.cli import float_range, int_at_least
from prefix.distributed import log, log_once, printable
from prefix.translation import Decoding, translate

MAX_BATCH = 1 << 16  # sentences
LINES_AT_A_TIME = 32  # batches, at most, that are read before the first of them is answered


def parse_arguments():
    parser = cli.Parser(prog="translate.py", description="Translate with a learned prefix.")
    add_options(parser)
    args = parser.parse_args()
    sampling = args.top_k > 0 or args.top_p < 1 or bool(args.temperature)
    if args.temperature is None:
        args.temperature = float(sampling)
    for wrong, message in (
        (not args.text and sys.stdin is None, "no text, and standard input is closed"),
        (args.length_penalty != 1 and args.beam == 1, "--length-penalty goes with --beam"),
        (args.choices and args.beam > 1, "--choices does not go with --beam"),
        (sampling and (args.choices or args.beam > 1), "--temperature, --top-k, --top-p: not with --beam or --choices"),
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
    add = parser.add_argument_group("decoding", "Without these, each token is the likeliest one.").add_argument
    n = lambda least, most=None: {"type": int_at_least(least, most), "metavar": "N"}
    x = lambda least, most, **more: {"type": float_range(least, most, **more), "metavar": "X"}
    add("--beam", **n(1), default=1, help="beam search with N beams (1: none)")
    add("--length-penalty", **x(-10, 10), default=1.0, help="beams are ranked by log p / length ** X (1.0)")
    add("--temperature", **x(0, 100), help="of samples (0: the likeliest; 1 with --top-k or --top-p)")
    add("--top-k", **n(0), default=0, help="sample among the N likeliest (0: all)")
    add("--top-p", **x(0, 1, open_low=True), default=1.0, help="sample in this part of all probability (1.0)")
    add("--seed", **n(0), default=0, help="of the samples (0)")
    add("--max-new-tokens", **n(1), help="of an answer (twice the source plus 16)")
    add("--batch-size", **n(1, MAX_BATCH), default=32, help="sentences decoded at a time (32)")
    text = "answer with the likeliest of these; put it behind the text (any answer)"
    add("--choices", nargs="+", metavar="ANSWER", help=text)
    cli.add_machine_options(parser)
    cli.add_weights_option(parser)


def main():
    args = parse_arguments()
    distributed.start(args.device)
    model, tokenizer, banks, _ = cli.load_with_base(args)
    source, target = cli.direction(args, banks)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    decoding = Decoding(args.max_new_tokens, sampler, args.beam, args.length_penalty, args.batch_size, args.choices)
    decoding.check(model.config)
    log(f"Translating {source} to {target}" + ("" if args.text else ", line by line from standard input"))
    chunks = iter([[os.fsencode(text) for text in args.text]]) if args.text else lines_as_they_come(args.batch_size)
    first, cut, divided, faulty = distributed.rank() == 0, 0, 0, 0
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
                faulty += bool(fault)
                cut += not (result.finished or fault)
                divided += result.pieces > 1
            bar.update(len(chunk))
    if divided:
        why = "too long for the model's context, with their longest answers"
        log(f"{divided} of {decoding.first} texts were {why}: translated sentence by sentence")
    if cut:
        log(f"{cut} of {decoding.first} translations were cut at their token limit (--max-new-tokens)")
    if faulty:
        raise UserError(f"{faulty} of {decoding.first} sentences could not be translated: their lines above say why")
    distributed.finish()


def decode_line(line):
    """The bytes of a line -> (text, why there is none or None)."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * line.count(0) > len(line) > 2:
        log_once("This seems to be UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8")
    if b"\0" in line:
        return "", "it holds a NUL byte"
    try:
        return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\r").decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{line[error.start]:02x} at its place {error.start + 1}"


def lines_as_they_come(batch_size):
    """Yield the lines of standard input, as bytes, in lists, as they come: those that are there by now, at least one and
    at most LINES_AT_A_TIME batches."""
    rest, at_most = b"", LINES_AT_A_TIME * batch_size  # rest: a line that has not ended yet
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
        while block := file.read(1 << 20):  # waits for the first byte only
            *lines, rest = (rest + block).split(b"\n")
            for start in range(0, len(lines), at_most):
                yield lines[start : start + at_most]
    if rest not in (b"", b"\0"):  # the second byte of UTF-16's newline is no line
        yield [rest]


if __name__ == "__main__":
    with cli.cli_errors():
        main()
