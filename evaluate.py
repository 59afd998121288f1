"""How far is the prefix ahead of k-shot prompting, on sentences that neither has seen?

python evaluate.py                                             the newest run (else the demo prefix), on its own corpus
python evaluate.py --prefix runs/x --limit 500 --json result.json
python evaluate.py --metrics label=accuracy summary=rouge      several tasks, each scored by its own metric
python evaluate.py --from tweet --to label --choices           a classifier: accuracy, macro-F1, a confusion matrix
"""

import signal
from datetime import datetime
from itertools import permutations
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli_errors: no traceback of what is still being imported

import torch

from minigpt import UserError
from minigpt.files import replacing
from prefix import cli, distributed, run
from prefix.data import corpus as data
from prefix.data import rows
from prefix.data.splits import SPLITS
from prefix.decoding import Decoding
from prefix.distributed import log, printable
from prefix.evaluation import report
from prefix.evaluation.attention_maps import look_at
from prefix.evaluation.compare import Comparison
from prefix.evaluation.metrics import ACCURACY, NAMES
from prefix.prefix_file import read_header

ANY_LENGTH = 1 << 30  # tokens of a pair, where sources are cut later
DEFAULT = ["bleu", "chrf"]
FILES = {"json": report.to_json, "hypotheses": report.to_tsv, "report": report.to_html}


def parse_arguments():
    parser = cli.Parser(prog="evaluate.py", description="Compare a learned prefix with k-shot prompting.")
    cli.add_prefix_option(parser)
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    number = lambda least, default=None: {"type": cli.int_at_least(least), "default": default, "metavar": "N"}

    option = parser.add_argument_group("which sentences").add_argument
    option("--data", nargs="+", metavar="FILE", help="default: what the prefix was trained on")
    option("--columns", nargs="+", metavar="NAME", help="evaluate between these (all that have a bank)")
    option("--from", dest="source", metavar="BANK", help="evaluate directions from this column only")
    option("--to", dest="target", metavar="BANK", help="evaluate directions into this column only")
    option("--split", choices=[*SPLITS, "all"], default="test", help="all: every row, for a file apart (test)")
    one = "all: rows with the same source are one sentence, their targets its references (one)"
    option("--references", choices=["one", "all"], default="one", help=one)
    option("--limit", **number(1, 500), help="sentences in each direction (500)")
    option("--max-tokens", **number(3, 384), help="longest pair, in tokens (384)")
    cut = "take long pairs, too; cut a source at its end to fit --max-new-tokens (here by default a quarter of the context)"
    option("--truncate-source", action="store_true", help=cut)

    option = parser.add_argument_group("how they are answered").add_argument
    option("--choices", nargs="*", metavar="TEXT", help="answer with one of these; of none, with one that training has")
    option("--shots", **number(0, 3), help="examples in a k-shot prompt (3)")
    option("--draws", **number(0, 3), help="draws of these examples (3); 0: no k-shot")
    option("--seed", **number(0, 0), help="of the draws (0)")
    option("--beam", **number(1, 1), help="beams for the prefix (1: greedy)")
    option("--max-new-tokens", **number(1), help="tokens of an answer at most (twice the source and 16)")
    option("--batch-size", **number(1, 32), help="sentences decoded at once (32)")

    option = parser.add_argument_group("what is shown and written").add_argument
    scored = f"of {', '.join(NAMES)} (bleu chrf); the first picks the median draw. label=accuracy summary=rouge: by the"
    scored += " column that is the target. accuracy (with macro-F1) answers with one of the training's labels"
    option("--metrics", nargs="+", default=DEFAULT, metavar="[COLUMN=]NAME", help=scored)
    option("--examples", **number(0, 3), help="sentences to show side by side (3)")
    option("--json", type=Path, metavar="FILE", help="write everything here as well")
    option("--hypotheses", type=Path, metavar="FILE.tsv", help="write source, reference, prefix, k-shot, one line each")
    option("--report", type=Path, metavar="FILE.html", help="write a page to look at, one file")
    cli.add_weights_option(parser)
    cli.add_machine_options(parser)
    return checked(parser, parser.parse_args())


def checked(parser, args):
    """The arguments, if they go together; else one line, before anything is loaded."""
    for name in FILES:
        path = getattr(args, name)
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: not a file in a folder that is there")
    for text in args.metrics:
        if text.rpartition("=")[2] not in NAMES:
            parser.error(f"--metrics {text}: the metrics are {', '.join(NAMES)}")
    if args.choices is not None and (not args.target or args.beam > 1):
        parser.error("--choices goes with --to, the column that they stand for, and without --beam")
    if args.choices:
        args.choices = [*dict.fromkeys(map(rows.clean, args.choices))]
        if "" in args.choices:
            parser.error("--choices: an answer is empty")
    if args.shots == 0:
        args.draws = min(args.draws, 1)  # there is nothing to draw
    return args


def main():
    args = parse_arguments()
    distributed.start(args.device)
    model, tokenizer, banks, prefixes = cli.load_with_base(args)
    wanted = directions(args, banks, prefixes)
    paths, columns, limit = cli.text_of(args, prefixes)
    columns = rows.columns_for(paths, banks.names, columns or args.columns)
    there = {ends: names for ends, names in wanted.items() if {*ends} <= {*columns}}
    if not there:
        raise UserError(f"{paths[0]}: no direction to evaluate between its columns {' and '.join(columns)}")
    longest = min(args.max_tokens, model.config.n_positions - banks.position_offset)
    corpus = data.load(paths, columns, tokenizer, limit, ANY_LENGTH if args.truncate_source else longest)
    for line in corpus.report:
        log(line)
    training, labels = corpus, not args.choices and any(ACCURACY in names for names in there.values())
    if args.split == "all" and (args.draws or labels):
        training = training_text(prefixes, columns, tokenizer, longest)
    elif args.truncate_source and args.draws:  # examples that are whole, and short enough for a few of them
        training = data.load(paths, columns, tokenizer, limit, longest)
    most = args.max_new_tokens or (model.config.n_positions // 4 if args.truncate_source else None)
    decoding = Decoding(most, beams=args.beam, batch_size=args.batch_size, choices=args.choices)
    chosen = {name: getattr(args, name) for name in ("split", "limit", "truncate_source", "shots", "draws", "seed")}
    chosen["all_references"] = args.references == "all"
    results = Comparison(model, tokenizer, banks, corpus, training, decoding, **chosen).results(there)
    speaks = distributed.rank() == 0
    distributed.finish()
    if not speaks:
        return
    settings = settings_of(args, prefixes, model) | {"data": paths, "columns": columns}
    if args.json or args.report:
        first = results[0]
        direction, text, output = (first.source, first.target), first.sources[0], first.prefix.outputs[0]
        first.attention = look_at(model, tokenizer, banks, text, direction, output).tables()
    for name, form in FILES.items():
        if path := getattr(args, name):
            with replacing(path) as temporary:  # a path in the settings need not be UTF-8
                temporary.write_text(form(settings, results), encoding="utf-8", errors="backslashreplace")
    print(printable(report.to_text(settings, results)))  # last: its reader may go away


def directions(args, banks, prefixes):
    """{(source, target): names of metrics}, in order of the target: of the directions that --columns, --from and --to
    leave, those that were trained, or all if none was."""
    metrics = {}  # of each target column; "": of the others
    for column, _, name in (text.rpartition("=") for text in args.metrics):
        metrics.setdefault(column, []).append(name)
    if args.choices is not None:
        metrics[args.target] = [ACCURACY]
    banks.mask([name for name in [args.source, args.target, *(args.columns or []), *metrics] if name])  # each is there
    names = [name for name in banks.names if name in (args.columns or banks.names)]
    wanted = [(s, t) for t in names for s in names if s != t and args.source in (None, s) and args.target in (None, t)]
    if not wanted:
        raise UserError(f"no direction is left between {' and '.join(names)}: name two --columns, or another --from or --to")
    trained = set()
    for header in map(read_header, prefixes):
        pairs = header["training"].get("pairs")
        trained |= {ends for ends in permutations(header["banks"], 2) if not pairs or ":".join(ends) in pairs}
    chosen = [ends for ends in wanted if ends in trained] or wanted
    return {(s, t): metrics.get(t) or metrics.get("") or DEFAULT for s, t in chosen}


def training_text(prefixes, columns, tokenizer, longest):
    """The Corpus that the prefix was trained on: for --split all, it has the examples and labels."""
    record, paths = read_header(prefixes[0])["training"], run.data_paths(cli.data_of(prefixes))
    training = data.load(paths, record.get("columns"), tokenizer, record.get("limit"), longest)
    if lacking := set(columns) - set(training.columns):
        raise UserError(f"--split all: no column {min(lacking)} in the training text: use --draws 0")
    return training


def settings_of(args, prefixes, model):
    """All that it takes to repeat an evaluation: the options, the base, the machine."""
    header = read_header(prefixes[0])
    settings = {name: value for name, value in vars(args).items() if name not in FILES}
    settings |= {"prefix": list(map(str, prefixes)), "model": args.model or header["training"]["model"]}
    settings |= {"base": header["base"]["fingerprint"], "device": str(model.device), "dtype": str(model.dtype)}
    return settings | {"torch": torch.__version__, "date": datetime.now().astimezone().isoformat(" ", timespec="minutes")}


if __name__ == "__main__":
    with cli.cli_errors():
        main()
