"""Translate with a learned prefix.

python translate.py "Bonjour"                       one translation per argument
python translate.py --from en --to fr < lines.txt   one per line of standard input, in order
"""

import sys
from itertools import islice

from minigpt import UserError
from minigpt.generate import Sampler
from prefix import command, distributed
from prefix.command import notice, number, whole
from prefix.translation import translate

LINES_AT_A_TIME = 32  # batches of standard input that are read before the first of them is answered


def parse_arguments():
    parser = command.Parser(prog="translate.py", description="Translate with a learned prefix.")
    parser.add_argument("text", nargs="*", help="sentences; without any, the lines of standard input")
    parser.add_argument("--from", dest="source", metavar="BANK", help="source language (the prefix's second bank)")
    parser.add_argument("--to", dest="target", metavar="BANK", help="target language (the prefix's first bank)")
    parser.add_argument("--prefix", metavar="FILE_OR_RUN", help="default: the newest run, else the demo prefix")
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    parser.add_argument("--beam", type=whole(1), default=1, metavar="N", help="beams (1: no beam search)")
    parser.add_argument("--temperature", type=number(0, 100), metavar="X", help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="N", help="sample among the N likeliest; 0: all")
    parser.add_argument("--top-p", type=number(0, 1, open_low=True), default=1.0, metavar="X")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N")
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="default: twice the source plus 16")
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="sentences decoded at once")
    command.add_machine_options(parser)
    args = parser.parse_args()
    sampling = args.top_k or args.top_p < 1
    if args.temperature is None:
        args.temperature = 1.0 if sampling else 0.0
    if args.beam > 1 and (args.temperature or sampling):
        parser.error("--beam does not go with --temperature, --top-k or --top-p")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, _ = command.load_with_base(args)
    source, target = command.direction(args, banks)
    if not args.text and sys.stdin.isatty():
        notice(f"Reading {source} sentences, one per line; Ctrl-D ends.")
    lines, done, cut, faults = iter(args.text or stdin_lines()), 0, 0, 0
    at_a_time = 1 if not args.text and sys.stdin.isatty() else LINES_AT_A_TIME * args.batch_size
    while chunk := distributed.from_first(list(islice(lines, at_a_time)) if distributed.rank() == 0 else None):
        sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
        results = translate(
            model,
            tokenizer,
            banks,
            chunk,
            source,
            target,
            args.max_new_tokens,
            args.batch_size,
            sampler,
            args.beam,
            done,
        )
        for line, result in enumerate(results, done + 1):
            if distributed.rank() == 0:
                print(result.text, flush=True)
            if result.fault:
                notice(f"line {line}: {result.fault}")
                faults += 1
            cut += not result.finished and not result.fault
        done += len(chunk)
    if cut:
        notice(f"{cut} of {done} translations were cut at their token limit (--max-new-tokens)")
    if faults:
        raise UserError(f"{faults} of {done} sentences could not be translated: cut them into shorter ones")


def stdin_lines():
    """The lines of standard input, which process 0 reads for all."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").removesuffix("\n").removesuffix("\r")


if __name__ == "__main__":
    with command.telling_errors():
        main()
