"""How far is the prefix ahead of k-shot prompting? BLEU and chrF on sentences that neither has seen.

python evaluate.py                              the newest run (else the demo prefix), on its own corpus
python evaluate.py --prefix runs/x --limit 500 --json result.json
"""

import json
from pathlib import Path

from minigpt.files import replacing
from minigpt.splits import SPLITS
from prefix import command, data, distributed, evaluation, metrics
from prefix.banks import read_metadata
from prefix.command import notice, whole


def parse_arguments():
    parser = command.Parser(prog="evaluate.py", description="Compare a learned prefix with k-shot prompting.")
    parser.add_argument("--prefix", metavar="FILE_OR_RUN", help="default: the newest run, else the demo prefix")
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="default: what the prefix was trained on")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="default: the prefix's banks")
    parser.add_argument("--split", choices=SPLITS, default="test")
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
    command.add_machine_options(parser)
    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json {args.json}: not a file in a folder that is there")
    if args.shots == 0:
        args.draws = min(args.draws, 1)  # there is nothing to draw
    return args


def main():
    args = parse_arguments()
    distributed.start()
    model, tokenizer, banks, path = command.load_with_base(args)
    trained_on = read_metadata(path)["training"]
    paths = command.data_paths(args.data or trained_on.get("data"))
    rows = evaluation.rows_to_read(args.split, args.limit)
    longest = min(args.max_tokens, model.config.n_positions)
    banks.mask(args.columns or [])  # each is there
    columns = [
        name for name in banks.names if name in (args.columns or banks.names)
    ]  # in training's order: splits go by it
    corpus = data.load(paths, columns, tokenizer, rows, longest)
    for line in corpus.skipped:
        notice(line)
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
    )
    if distributed.rank() > 0:
        return
    for report in reports:
        print("\n".join(evaluation.table(report, args.shots)), end="\n\n")
        if args.show_prompt and report["few_shot"]:
            print(report["few_shot"]["prompts"][0])
        if args.examples:
            print("\n".join(evaluation.examples(report, args.examples, args.shots)))
    decoding = f"beam {args.beam}" if args.beam > 1 else "greedy"
    shots = f"{args.draws} draws of {args.shots} shots"
    settings = f"prefix {path}, data {' '.join(paths)}, split {args.split}, {decoding}, {shots}"
    bleu, chrf = (metrics.signature(metric, reports[0]["references"]) for metric in ("BLEU", "chrF2"))
    print(f"{settings}\nBLEU {bleu}   chrF2 {chrf}")
    print("sentence BLEU: mean of nltk's sentence_bleu on words split at spaces, as the notebook has it")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"} | {
            "prefix": str(path),
            "data": paths,
        }
        signatures = {"bleu": bleu, "chrf": chrf}
        with replacing(args.json) as temporary:
            content = {"settings": settings, "signatures": signatures, "directions": reports}
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with command.telling_errors():
        main()
