"""Translate with a learned prefix.

python translate.py "Bonjour"                       one translation per argument
python translate.py --from en --to fr < lines.txt   one per line of standard input, in order
"""

import os
import select
import stat
import sys

from tqdm import tqdm

from minigpt import UserError
from minigpt.generate import Sampler
from prefix import cli, distributed
from prefix.cli import float_range, int_at_least
from prefix.distributed import log, printable
from prefix.translation import translate

LINES_AT_A_TIME = 32  # batches of standard input, at most, that are read before the first of them is answered


def parse_arguments():
    parser = cli.Parser(prog="translate.py", description="Translate with a learned prefix.")
    parser.add_argument("text", nargs="*", help="sentences; without any, the lines of standard input")
    parser.add_argument(
        "--from", dest="source", metavar="BANK", help="source (the second bank, or the first that is not --to)"
    )
    parser.add_argument("--to", dest="target", metavar="BANK", help="target (the first bank that is not --from)")
    cli.add_prefix_option(parser)
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    parser.add_argument("--beam", type=int_at_least(1), default=1, metavar="N", help="beams (1: no beam search)")
    parser.add_argument(
        "--length-penalty", type=float_range(-10, 10), metavar="X", help="beams are ranked by log p / length**X (1)"
    )
    parser.add_argument("--temperature", type=float_range(0, 100), metavar="X", help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int_at_least(0), default=0, metavar="N", help="sample among the N likeliest; 0: all")
    parser.add_argument("--top-p", type=float_range(0, 1, open_low=True), default=1.0, metavar="X")
    parser.add_argument("--seed", type=int_at_least(0), default=0, metavar="N")
    parser.add_argument("--max-new-tokens", type=int_at_least(1), metavar="N", help="default: twice the source plus 16")
    parser.add_argument("--batch-size", type=int_at_least(1), default=32, metavar="N", help="sentences decoded at once")
    parser.add_argument(
        "--choices", nargs="+", metavar="ANSWER", help="answer with the likeliest of these; put it behind the text"
    )
    cli.add_weights_option(parser)
    cli.add_machine_options(parser)
    args = parser.parse_args()
    if args.length_penalty is not None and args.beam == 1:
        parser.error("--length-penalty goes with --beam")
    sampling = args.top_k or args.top_p < 1
    if args.temperature is None:
        args.temperature = 1.0 if sampling else 0.0
    if args.beam > 1 and (args.temperature or sampling):
        parser.error("--beam does not go with --temperature, --top-k or --top-p")
    if args.choices and (args.beam > 1 or args.temperature or sampling):
        parser.error("--choices does not go with --beam, --temperature, --top-k or --top-p")
    if args.choices and not all(choice.strip() for choice in args.choices):
        parser.error("--choices: an answer is empty")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, _ = cli.load_with_base(args)
    source, target = cli.direction(args, banks)
    if args.choices and not args.text:
        log(f"Reading sentences from standard input: --choices took all of {', '.join(args.choices)}")
    if not args.text and sys.stdin.isatty():
        log(f"Reading {source} sentences, one per line; Ctrl-D ends.")
    chunks = iter([args.text]) if args.text else lines_as_they_come(LINES_AT_A_TIME * args.batch_size)
    first, done, cut, faults, divided = distributed.rank() == 0, 0, 0, 0, 0
    with progress(args.text) as bar:
        while chunk := distributed.broadcast(next(chunks, None) if first else None):
            output = Output()
            results = translate(
                model,
                tokenizer,
                banks,
                chunk,
                source,
                target,
                max_new=args.max_new_tokens,
                batch_size=args.batch_size,
                sampler=Sampler(args.temperature, args.top_k, args.top_p, args.seed),
                beams=args.beam,
                length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
                first=done,
                choices=args.choices,
                on_text=output.grow if first and sys.stdout.isatty() and len(chunk) == 1 else None,
            )
            for line, result in enumerate(results, done + 1):
                if first:
                    output.line(result.text)
                if result.fault:
                    log(f"line {line}: {result.fault}")
                faults += bool(result.fault)
                cut += not result.finished and not result.fault
                divided += result.pieces > 1
            done += len(chunk)
            bar.update(len(chunk))
    if divided:
        log(
            f"{divided} of {done} texts were too long for the model's context: translated in parts, cut at sentence ends"
        )
    if cut:
        log(f"{cut} of {done} translations were cut at their token limit (--max-new-tokens)")
    if faults:
        raise UserError(f"{faults} of {done} sentences could not be translated: cut them into shorter ones")


class Output:
    """One line of standard output after another; on a terminal a single one may grow before it is whole."""

    def __init__(self):
        self.there = ""

    def grow(self, text):
        print(printable(text[len(self.there) :]), end="", flush=True)
        self.there = text

    def line(self, text):
        print(printable(text[len(self.there) :]), flush=True)
        self.there = ""


def lines_as_they_come(at_most):
    """Yield the lines of standard input, in lists: those that are there by now, at least one and no more than at_most.
    Process 0 reads for all."""
    fd, lines, begun = sys.stdin.fileno(), [], []  # begun: the parts of a line that has not ended yet
    while True:
        while len(lines) < at_most and (not lines or select.select([fd], [], [], 0)[0]):
            block = os.read(fd, 1 << 16)
            if not block:
                last = b"".join(begun)
                yield lines + [text_of(last)] * bool(last)
                return
            *ended, rest = block.split(b"\n")
            if ended:
                ended[0] = b"".join([*begun, ended[0]])
                begun = []
                lines += map(text_of, ended)
            begun.append(rest)
        yield lines[:at_most]
        lines = lines[at_most:]


def text_of(line):
    return line.decode("utf-8", errors="replace").removesuffix("\r")


def progress(texts):
    """A bar on standard error for a file: where that is a terminal, and standard output is not."""
    quiet = texts or distributed.rank() > 0 or sys.stdout.isatty() or not sys.stderr.isatty()
    return tqdm(total=None if quiet else lines_ahead(sys.stdin.fileno()), unit=" lines", disable=quiet, file=sys.stderr)


def lines_ahead(fd):
    """How many lines a regular file has left to read; None for a pipe or a terminal."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    at, lines, last = os.lseek(fd, 0, os.SEEK_CUR), 0, b"\n"
    while block := os.pread(fd, 1 << 20, at):
        at, lines, last = at + len(block), lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


if __name__ == "__main__":
    with cli.cli_errors():
        main()
