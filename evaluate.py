"""How far is the prefix ahead of k-shot prompting, on sentences that neither has seen?

python evaluate.py                                             the newest run (else the demo prefix), on its own corpus
python evaluate.py --prefix runs/x --limit 500 --json result.json
python evaluate.py --from tweet --to label --choices           a classifier: accuracy, macro-F1, a confusion matrix
python evaluate.py --from article --to summary --metrics rouge --truncate-source
"""

from datetime import datetime
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
from prefix.evaluation import report
from prefix.evaluation.attention_maps import look_at
from prefix.evaluation.compare import Evaluation, Plan, compare, enough, rows_to_read
from prefix.evaluation.metrics import GROUPS, METRICS
from prefix.prefix_file import read_header
from prefix.translation import Decoding

ANY_LENGTH = 1 << 30  # tokens of a pair, where sources are cut later
FILES = {"json": report.to_json, "hypotheses": report.to_tsv, "report": report.to_html}


def parse_arguments():
    parser = cli.Parser(prog="evaluate.py", description="Compare a learned prefix with k-shot prompting.")
    cli.add_prefix_option(parser)
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    add_sentence_options(parser.add_argument_group("which sentences"))
    add_answer_options(parser.add_argument_group("how they are answered"))
    add_result_options(parser.add_argument_group("what is shown and written"))
    cli.add_weights_option(parser)
    cli.add_machine_options(parser)
    args = parser.parse_args()
    for name in FILES:
        path = getattr(args, name)
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


def number(least, default=None, metavar="N"):
    return {"type": int_at_least(least), "default": default, "metavar": metavar}


def add_sentence_options(group):
    option = group.add_argument
    option("--data", nargs="+", metavar="FILE", help="default: what the prefix was trained on")
    option("--columns", nargs="+", metavar="NAME", help="evaluate between these (all that have a bank)")
    option("--from", dest="source", metavar="BANK", help="evaluate directions from this column only")
    option("--to", dest="target", metavar="BANK", help="evaluate directions into this column only")
    option("--split", choices=[*SPLITS, "all"], default="test", help="all: every row, for a file apart (test)")
    references = "all: rows with the same source are one sentence, their targets its references; reads the whole file"
    option("--references", choices=["one", "all"], default="one", help=f"{references} (one)")
    head = "from the head of the file, unless --references all, --choices or a rare direction needs all of it"
    option("--limit", **number(1, 500), help=f"sentences in each direction (500), {head}")
    option("--max-tokens", **number(3, 384), help="longest pair, in tokens (384)")
    cut = (
        "pairs of any length: cut a source at its end so that an answer of --max-new-tokens (a quarter of the context)"
    )
    option("--truncate-source", action="store_true", help=f"{cut} fits behind it")


def add_answer_options(group):
    option = group.add_argument
    chosen = "answer with one of these texts; without any, one that training has in the column --to"
    option("--choices", nargs="*", metavar="TEXT", help=chosen)
    option("--shots", **number(0, 3, "K"), help="examples in the prompt (3)")
    option("--draws", **number(0, 3), help="draws of these examples (3); 0: no k-shot")
    option("--seed", **number(0, 0), help="of the draws (0)")
    option("--beam", **number(1, 1), help="beams for the prefix (1: greedy)")
    option("--max-new-tokens", **number(1), help="tokens of an answer at most (twice the source and 16)")
    option("--batch-size", **number(1, 32), help="sentences decoded at once (32)")


def add_result_options(group):
    option, names = group.add_argument, [*METRICS, *GROUPS]
    scored = f"of {', '.join(names)} (bleu chrf); the first picks the median draw; --choices has accuracy and macro-F1"
    option("--metrics", nargs="+", choices=names, default=["bleu", "chrf"], metavar="NAME", help=scored)
    option("--examples", **number(0, 3), help="sentences to show side by side (3)")
    option("--show-prompt", action="store_true", help="show the first k-shot prompt of each direction")
    option("--json", type=Path, metavar="FILE", help="write everything here as well")
    option("--hypotheses", type=Path, metavar="FILE.tsv", help="write source, reference, prefix, k-shot, one line each")
    option("--report", type=Path, metavar="FILE.html", help="write a page to look at, one file")


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, prefixes = cli.load_with_base(args)
    trained_on, wanted = read_header(prefixes[0])["training"], directions(args, banks)
    paths, columns = rows.columns_for(run.data_paths(args.data or cli.data_of(prefixes)), banks.names, args.columns)
    longest = min(args.max_tokens, model.config.n_positions - banks.position_offset)
    load = lambda limit, longest: data.load(paths, columns, tokenizer, limit, longest)
    corpus = read(args, wanted, lambda limit: load(limit, ANY_LENGTH if args.truncate_source else longest))
    for line in corpus.report:
        log(line)
    plan = Plan(args.split, args.limit, args.shots, args.draws, args.seed, args.metrics, wanted)
    plan.multi_reference, plan.truncate_source = args.references == "all", args.truncate_source
    if args.split == "all":
        plan.training = training_text(args, prefixes, paths, columns, tokenizer, longest)
    elif args.truncate_source and args.draws:  # examples that are whole, and short enough for a few of them
        plan.training = load(rows_to_read(args.split, args.limit), longest)
    choice = {"choices": args.choices, "batch_size": args.batch_size}
    results = compare(model, tokenizer, banks, corpus, plan, Decoding(args.max_new_tokens, beams=args.beam, **choice))
    if distributed.rank() > 0:
        return
    settings = settings_of(args, prefixes, model) | {"data": paths, "columns": columns}
    evaluation = Evaluation(settings | {"model": args.model or trained_on["model"]}, results)
    if args.report:
        evaluation.attention = look_at_first(model, tokenizer, banks, results[0])
    print(printable(report.to_text(evaluation)))
    for name, written in FILES.items():
        if path := getattr(args, name):
            with replacing(path) as temporary:  # a path in the settings need not be UTF-8
                temporary.write_text(written(evaluation), encoding="utf-8", errors="backslashreplace")


def read(args, wanted, load):
    """The Corpus to evaluate on: the head of the files, but all of them where --references or --choices ask what there
    is altogether, or where rows that lack a column leave the head with too few sentences in a wanted direction."""
    n_rows = rows_to_read(args.split, args.limit)
    if args.references != "all" and args.choices != []:
        head = load(n_rows)
        if len(head) < n_rows or enough(head, args.split, args.limit, wanted):
            return head
    return load(None)


def training_text(args, prefixes, paths, columns, tokenizer, longest):
    """For --split all: the Corpus that the prefix was trained on, where examples or labels come from it; else None."""
    trained_on = read_header(prefixes[0])["training"]
    if set(run.data_names(paths)) & set(trained_on.get("data", [])):
        log("--split all: among these sentences are those that the prefix was trained on")
    if not args.draws and args.choices != []:
        return None
    where, names = run.data_paths(cli.data_of(prefixes)), trained_on.get("columns")
    training = data.load(where, names, tokenizer, trained_on.get("limit"), longest)
    if lacking := set(columns) - set(training.columns):
        raise UserError(f"--split all: no column {min(lacking)} in the training text: use --draws 0")
    return training


def settings_of(args, prefixes, model):
    """What an evaluation is to be repeated with: the options, the machine's, and how each prefix file came to be."""
    settings = {name: value for name, value in vars(args).items() if name not in FILES}
    settings |= {"prefix": [str(path) for path in prefixes], "trained": list(map(training_of, prefixes))}
    settings |= {"base": read_header(prefixes[0])["base"]["fingerprint"], "torch": torch.__version__}
    likeliest = "likeliest choice" if args.choices is not None else None
    settings["decoding"] = likeliest or (f"beam {args.beam}" if args.beam > 1 else "greedy")
    settings["date"] = datetime.now().astimezone().isoformat(" ", timespec="minutes")
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


def look_at_first(model, tokenizer, banks, result):
    """The Attention of a direction's first sentence that has a translation, if any has."""
    for text, output in zip(result.sources, result.prefix.outputs):
        if output:
            return look_at(model, tokenizer, banks, text, (result.source, result.target), output)


if __name__ == "__main__":
    with cli.cli_errors():
        main()
