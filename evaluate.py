"""How far is the prefix ahead of k-shot prompting? BLEU and chrF on sentences that neither has seen.

python evaluate.py                              the newest run (else the demo prefix), on its own corpus
python evaluate.py --prefix runs/x --limit 500 --json result.json
python evaluate.py --from tweet --to label --choices        a classifier: "exact %" is its accuracy
"""

import json
from itertools import permutations
from pathlib import Path

import torch

from minigpt import UserError
from minigpt.files import replacing
from prefix import cli, distributed, run
from prefix.cli import int_at_least
from prefix.data import corpus as data
from prefix.data import rows
from prefix.data.splits import SPLITS
from prefix.distributed import log, printable
from prefix.evaluation import compare as evaluation
from prefix.evaluation import metrics
from prefix.evaluation.attention_maps import look_at
from prefix.evaluation.report import write_page
from prefix.prefix_file import read_header


def parse_arguments():
    parser = cli.Parser(prog="evaluate.py", description="Compare a learned prefix with k-shot prompting.")
    cli.add_prefix_option(parser)
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
    parser.add_argument(
        "--limit",
        type=int_at_least(1),
        default=500,
        metavar="N",
        help="sentences in each direction (500), from the head of the file: no more of it is read than they take, unless"
        " --references all or --choices needs all of it, or a direction has too few there",
    )
    parser.add_argument("--shots", type=int_at_least(0), default=3, metavar="K", help="examples in the prompt (3)")
    parser.add_argument(
        "--draws", type=int_at_least(0), default=3, metavar="N", help="draws of these examples (3); 0: no k-shot"
    )
    parser.add_argument("--beam", type=int_at_least(1), default=1, metavar="N", help="beams for the prefix (1: greedy)")
    parser.add_argument("--max-tokens", type=int_at_least(3), default=384, metavar="N", help="longest pair, in tokens (384)")
    parser.add_argument("--batch-size", type=int_at_least(1), default=32, metavar="N", help="sentences decoded at once")
    parser.add_argument("--seed", type=int_at_least(0), default=0, metavar="N", help="of the draws")
    parser.add_argument("--examples", type=int_at_least(0), default=3, metavar="N", help="sentences to show side by side (3)")
    parser.add_argument("--show-prompt", action="store_true", help="show the first k-shot prompt of each direction")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page to look at, one file")
    cli.add_weights_option(parser)
    cli.add_machine_options(parser)
    args = parser.parse_args()
    for name, path in (("json", args.json), ("report", args.report)):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: not a file in a folder that is there")
    if args.shots == 0:
        args.draws = min(args.draws, 1)  # there is nothing to draw
    if args.choices is not None and (not args.target or args.beam > 1):
        parser.error("--choices goes with --to, the column that they stand for, and without --beam")
    if args.columns and len(set(args.columns)) < max(2, len(args.columns)):
        parser.error(f"--columns {' '.join(args.columns)}: name two or more, each of them once")
    if not all(choice.strip() for choice in args.choices or []):
        parser.error("--choices: an answer is empty")
    return args


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, prefixes = cli.load_with_base(args)
    trained_on, wanted = read_header(prefixes[0])["training"], directions(args, banks)
    files = run.data_paths(args.data or cli.data_of(prefixes))
    paths, columns = rows.columns_for(files, banks.names, args.columns)
    longest = min(args.max_tokens, model.config.n_positions - banks.position_offset)
    corpus = read(args, paths, columns, tokenizer, longest, wanted)
    for line in corpus.report:
        log(line)
    training = corpus if args.split != "all" else None
    if not training and set(run.data_names(paths)) & set(trained_on.get("data", [])):
        log("--split all: among these sentences are those that the prefix was trained on")
    if not training and (args.draws or args.choices == []):
        where, names = run.data_paths(cli.data_of(prefixes)), trained_on.get("columns")
        training = data.load(where, names, tokenizer, trained_on.get("limit"), longest)
        if lacking := set(columns) - set(training.columns):
            raise UserError(f"--split all: no column {min(lacking)} in the training text: use --draws 0")
    reports = evaluation.compare(
        model,
        tokenizer,
        banks,
        corpus,
        split=args.split,
        limit=args.limit,
        shots=args.shots,
        draws=args.draws,
        seed=args.seed,
        beams=args.beam,
        batch_size=args.batch_size,
        wanted=wanted,
        together=args.references == "all",
        choices=args.choices,
        training=training,
    )
    if distributed.rank() > 0:
        return
    settings = settings_of(args, prefixes, model)
    settings |= {"model": args.model or trained_on["model"], "data": paths, "columns": columns}
    references = [refs for report in reports for refs in report["references"]]
    signatures = {"bleu": metrics.signature("BLEU", references), "chrf": metrics.signature("chrF2", references)}
    print_results(args, settings, signatures, reports)
    if args.json:
        with replacing(args.json) as temporary:
            content = {"settings": settings, "signatures": signatures, "directions": reports}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a path that is not UTF-8
    if args.report:
        attention = look_at_first(model, tokenizer, banks, reports[0])
        write_page(args.report, reports, args.shots, args.examples, settings, signatures, attention)


def read(args, paths, columns, tokenizer, longest, wanted):
    """The Corpus to evaluate on: the head of the files, but all of them where --references or --choices ask what there
    is altogether, or where rows that lack a column leave the head with too few sentences in a wanted direction."""
    n_rows = evaluation.rows_to_read(args.split, args.limit)
    if args.references != "all" and args.choices != []:
        head = data.load(paths, columns, tokenizer, n_rows, longest)
        if len(head) < n_rows or evaluation.enough(head, args.split, args.limit, wanted):
            return head
    return data.load(paths, columns, tokenizer, None, longest)


def settings_of(args, prefixes, model):
    """What an evaluation is to be repeated with: the options, the machine's, and how each prefix file came to be."""
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "report")}
    settings |= {"prefix": [str(path) for path in prefixes], "trained": list(map(training_of, prefixes))}
    settings |= {"base": read_header(prefixes[0])["base"]["fingerprint"], "torch": torch.__version__}
    return settings | {"device": str(model.device), "dtype": str(model.dtype)}


def training_of(path):
    """What a prefix file says of its training, in a line. It may say nothing: an imported one does not."""
    metadata = read_header(path)
    record = metadata["training"]
    settings = record.get("settings")
    said = {**record, **(settings if isinstance(settings, dict) else {}), "prefix_len": metadata["prefix_len"]}
    said["data"] = " ".join(Path(name).name for name in record.get("data", [])) or None
    names = ("init", "prefix_len", "lr", "steps", "seed", "data")
    return ", ".join(f"{name} {said[name]}" for name in names if said.get(name) is not None)


def print_results(args, settings, signatures, reports):
    for report in reports:
        print(printable("\n".join(evaluation.table(report, args.shots))), end="\n\n")
        if args.show_prompt and report["few_shot"]:
            print(printable(report["few_shot"]["prompts"][0]))
        if args.examples:
            print(printable("\n".join(evaluation.examples(report, args.examples, args.shots))))
    decoding = "likeliest choice" if args.choices is not None else f"beam {args.beam}" if args.beam > 1 else "greedy"
    shots = f"{args.draws} draws of {args.shots} shots"
    prefixes, paths = " ".join(settings["prefix"]), " ".join(settings["data"])
    print(printable(f"prefix {prefixes}, data {paths}, split {args.split}, {decoding}, {shots}"))
    if args.choices is None:
        print(printable(f"BLEU {signatures['bleu']}   chrF2 {signatures['chrf']}"))
        print("sentence BLEU: mean of nltk's sentence_bleu on words split at spaces, as the notebook has it")


def directions(args, banks):
    """The (source, target) pairs of names that --columns, --from and --to leave."""
    names = args.columns or banks.names
    banks.mask([*names, *filter(None, [args.source, args.target])])  # each is there
    pairs = permutations(names, 2)
    wanted = {(s, t) for s, t in pairs if args.source in (None, s) and args.target in (None, t)}
    if not wanted:
        told = " ".join(f"--{end} {name}" for end, name in (("from", args.source), ("to", args.target)) if name)
        raise UserError(f"{told or 'this prefix'}: no direction between {', '.join(names)} is like that")
    return wanted


def look_at_first(model, tokenizer, banks, report):
    """The Attention of a direction's first sentence that has a translation, if any has."""
    for text, output in zip(report["sources"], report["outputs"]):
        if output:
            return look_at(model, tokenizer, banks, text, report["source"], report["target"], output)


if __name__ == "__main__":
    with cli.cli_errors():
        main()
