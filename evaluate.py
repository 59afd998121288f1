"""How far is the prefix ahead of k-shot prompting? BLEU and chrF on sentences that neither has seen.

python evaluate.py                              the newest run (else the demo prefix), on its own corpus
python evaluate.py --prefix runs/x --limit 500 --json result.json
python evaluate.py --from tweet --to label --choices        a classifier: the accuracy is under "exact %"
"""

import json
from itertools import permutations
from pathlib import Path

from minigpt import UserError
from minigpt.files import replacing
from minigpt.splits import SPLITS
from prefix import command, data, distributed, evaluation, metrics, rows
from prefix.banks import read_metadata
from prefix.command import notice, shown, whole
from prefix.inspect import look_at
from prefix.report import write_page


def parse_arguments():
    parser = command.Parser(prog="evaluate.py", description="Compare a learned prefix with k-shot prompting.")
    command.add_prefix_option(parser)
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="default: what the prefix was trained on")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="evaluate between these (all that have a bank)")
    parser.add_argument("--from", dest="source", metavar="BANK", help="evaluate directions from this column only")
    parser.add_argument("--to", dest="target", metavar="BANK", help="evaluate directions into this column only")
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="test", help="all: every row of a file apart")
    parser.add_argument(
        "--references",
        choices=["one", "all"],
        default="one",
        help="all: rows with the same source are one sentence, their targets its references; reads the whole file",
    )
    parser.add_argument(
        "--choices",
        nargs="*",
        metavar="TEXT",
        help="answer with one of these texts; without any, one that training has in the column --to",
    )
    parser.add_argument("--limit", type=whole(1), default=500, metavar="N", help="sentences in each direction (500)")
    parser.add_argument("--shots", type=whole(0), default=3, metavar="K", help="examples in the prompt (3)")
    parser.add_argument(
        "--draws", type=whole(0), default=3, metavar="N", help="draws of these examples (3); 0: no k-shot"
    )
    parser.add_argument("--beam", type=whole(1), default=1, metavar="N", help="beams for the prefix (1: greedy)")
    parser.add_argument("--max-tokens", type=whole(3), default=384, metavar="N", help="longest pair, in tokens (384)")
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="sentences decoded at once")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the draws")
    parser.add_argument("--examples", type=whole(0), default=3, metavar="N", help="sentences to show side by side (3)")
    parser.add_argument("--show-prompt", action="store_true", help="show the first k-shot prompt of each direction")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page to look at, one file")
    command.add_weights_option(parser)
    command.add_machine_options(parser)
    args = parser.parse_args()
    for name, path in (("json", args.json), ("report", args.report)):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: not a file in a folder that is there")
    if args.shots == 0:
        args.draws = min(args.draws, 1)  # there is nothing to draw
    if args.choices is not None and (not args.target or args.beam > 1):
        parser.error("--choices goes with --to, the column that they stand for, and without --beam")
    if not all(choice.strip() for choice in args.choices or []):
        parser.error("--choices: an answer is empty")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, prefixes = command.load_with_base(args)
    trained_on, wanted = read_metadata(prefixes[0])["training"], directions(args, banks)
    paths, columns = rows.columns_for(command.data_paths(args.data or data_of(prefixes)), banks.names, args.columns)
    together = args.references == "all"
    n_rows = None if together else evaluation.rows_to_read(args.split, args.limit)
    longest = min(args.max_tokens, model.config.n_positions - banks.position_offset)
    corpus = data.load(paths, columns, tokenizer, n_rows, longest)
    for line in corpus.report:
        notice(line)
    training = corpus if args.split != "all" else None
    if not training and set(command.data_names(paths)) & set(trained_on.get("data", [])):
        notice("--split all: among these sentences are those that the prefix was trained on")
    if not training and (args.draws or args.choices == []):
        where, names = command.data_paths(data_of(prefixes)), trained_on.get("columns")
        training = data.load(where, names, tokenizer, trained_on.get("limit"), longest)
        if lacking := set(columns) - set(training.columns):
            raise UserError(f"--split all: no column {min(lacking)} in the training text: use --draws 0")
    reports = evaluation.compare(
        model,
        tokenizer,
        banks,
        corpus,
        args.split,
        args.limit,
        args.shots,
        args.draws,
        args.seed,
        args.beam,
        args.batch_size,
        wanted,
        together,
        args.choices,
        training,
    )
    if distributed.rank() > 0:
        return
    for report in reports:
        print(shown("\n".join(evaluation.table(report, args.shots))), end="\n\n")
        if args.show_prompt and report["few_shot"]:
            print(shown(report["few_shot"]["prompts"][0]))
        if args.examples:
            print(shown("\n".join(evaluation.examples(report, args.examples, args.shots))))
    decoding = "likeliest choice" if args.choices is not None else f"beam {args.beam}" if args.beam > 1 else "greedy"
    shots = f"{args.draws} draws of {args.shots} shots"
    settings = f"prefix {' '.join(map(str, prefixes))}, data {' '.join(paths)}, split {args.split}, {decoding}, {shots}"
    references = [refs for report in reports for refs in report["references"]]
    bleu, chrf = (metrics.signature(metric, references) for metric in ("BLEU", "chrF2"))
    print(shown(f"{settings}\nBLEU {bleu}   chrF2 {chrf}"))
    print("sentence BLEU: mean of nltk's sentence_bleu on words split at spaces, as the notebook has it")
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "report")}
    settings |= {"prefix": [str(path) for path in prefixes], "model": args.model or trained_on["model"], "data": paths}
    settings |= {"columns": columns, "device": str(model.device), "dtype": str(model.dtype)}
    signatures = {"bleu": bleu, "chrf": chrf}
    if args.json:
        with replacing(args.json) as temporary:
            content = {"settings": settings, "signatures": signatures, "directions": reports}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a path that is not UTF-8
    if args.report:
        attention = look_at_first(model, tokenizer, banks, reports[0])
        write_page(args.report, reports, args.shots, args.examples, settings, signatures, attention)


def directions(args, banks):
    """The (source, target) pairs of names that --columns, --from and --to leave."""
    names = args.columns or banks.names
    banks.mask([*names, *filter(None, [args.source, args.target])])  # each is there
    pairs = permutations(names, 2)
    wanted = {(s, t) for s, t in pairs if args.source in (None, s) and args.target in (None, t)}
    if not wanted:
        told = " ".join(f"--{end} {name}" for end, name in (("from", args.source), ("to", args.target)) if name)
        raise UserError(f"{told}: no direction between {', '.join(names)} is like that")
    return wanted


def data_of(prefixes):
    """The files that these prefixes were trained on. Raises UserError where they do not say, or differ."""
    records = [read_metadata(path)["training"].get("data") for path in prefixes]
    for path, files in zip(prefixes, records):
        if not files:
            raise UserError(f"{path} does not say what it was trained on: name the text with --data")
        if files != records[0]:
            raise UserError(f"{path} was trained on other text than {prefixes[0]}: name some with --data")
    return records[0]


def look_at_first(model, tokenizer, banks, report):
    """The Attention of a direction's first sentence that has a translation, if any has."""
    for text, output in zip(report["sources"], report["outputs"]):
        if output:
            return look_at(model, tokenizer, banks, text, report["source"], report["target"], output)


if __name__ == "__main__":
    with command.telling_errors():
        main()
