"""Is a prefix worth it? The same base, the same pairs, the same decoding, and every other way to ask for a translation.

The ways are in ways.py. All that train see the same pairs in the same order, for as many steps, in float32, with AdamW
without weight decay, a twentieth of the steps as warm-up, and linear decay; the weights of the last step count. Each
has its own learning rate, and a learning rate decides more than anything else, so a short sweep of one seed chooses it
by validation loss: three rates of 1, 3, 10, 30 ..., and the next one for as long as the best stands at the edge.
Shots come from the same training pairs. Scores are those of test sentences whose two sides are both new.

    python tests/benchmarks/baselines.py                                       the sample corpus: some 100 sentences
    python tests/benchmarks/baselines.py --data short-tatoeba.en-fr.csv --limit 10600 --results rows.jsonl

Each row runs in a process of its own. Seconds are those of the CPU, in all threads. Memory is the process's peak in
training (without training: in answering) above what it held before the model. --results keeps each row as it comes, and
a row that is there is not run again. The last line printed is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import Peak, best_rate, circumstances, fresh, measure_row
from ways import (
    FineTuning,
    LoRA,
    Prefix,
    PromptTuning,
    nearest_shots,
    train,
    validation_loss,
)

from minigpt import GPT, Tokenizer
from prefix.data import corpus as data
from prefix.data.corpus import sample_rows
from prefix.evaluation import metrics
from prefix.evaluation.few_shot import draw_shots, few_shot
from prefix.run import DEMO_CORPUS

TRAINED = {  # name: (what trains, the middle one of the first three rates)
    "prefix": (Prefix, 1e-1),
    "prompt tuning": (PromptTuning, 3e-2),
    "fine-tuning": (FineTuning, 1e-4),
    "LoRA": (LoRA, 3e-3),
}
SHOTS = (0, 1, 3, 5)
SENTENCES = ("outputs", "references")  # of a row: kept in --results, left out at the end


def main():
    args = parse_arguments()
    if args.row:
        return measure_row(measure, args)
    args.base = GPT.from_pretrained(args.model).fingerprint  # "demo" may come to be another
    table = {}
    for way, (_, middle) in TRAINED.items():
        lr = best_rate(middle, lambda lr: row(args, way=way, sweep=lr, steps=args.sweep_steps)["validation_loss"])
        table[f"{way}, lr {lr:g}"] = [row(args, way=way, lr=lr, steps=args.steps, seed=0)]
    for k in SHOTS:
        table[f"{k}-shot"] = row(args, way="shots", k=k, draws=args.draws if k else 1)["draws"]
    for k in SHOTS[1:]:
        table[f"{k} nearest"] = row(args, way="nearest", k=k, draws=1)["draws"]
    for k in SHOTS:
        table[f"{k} bare"] = row(args, way="bare", k=k, draws=args.draws if k else 1)["draws"]
    for name in list(table)[: len(TRAINED)]:  # last, so that an interrupted table has a line for each way
        way, lr = name.split(", lr ")
        table[name] += [row(args, way=way, lr=float(lr), steps=args.steps, seed=s) for s in range(1, args.seeds)]
    show(table)
    print(json.dumps({"circumstances": circumstances(args.device), "rows": brief(table)}))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Compare a prefix with other ways to steer the same model.")
    parser.add_argument("--model", default="demo", help="a checkpoint's directory (the demo)")
    parser.add_argument("--data", type=Path, default=DEMO_CORPUS)
    parser.add_argument("--limit", type=int, help="read no more than this many usable pairs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sweep-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per step (32)")
    parser.add_argument("--sentences", type=int, default=400, help="of the test split, each direction (400)")
    parser.add_argument("--seeds", type=int, default=3, help="of the order of the pairs (3)")
    parser.add_argument("--draws", type=int, default=3, help="of the shots (3)")
    parser.add_argument("--results", type=Path, help="where rows are kept, as JSON lines")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how this script calls itself: one row, in its own process
    parser.add_argument("--home", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu"
    return args


# Rows


def row(args, **what):
    """The result of a row: from --results where it is there, else measured now."""
    given = {name: str(getattr(args, name)) for name in ("model", "base", "data", "limit", "batch_size", "sentences")}
    for line in args.results.read_text().splitlines() if args.results and args.results.exists() else []:
        kept = json.loads(line)
        if kept["what"] == what and kept["given"] == given:
            return kept["result"]
    start = time.monotonic()
    result = fresh(json.dumps(what), ".")
    if "error" in result:
        sys.exit(f"{what}: {result['error']}")
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps({"what": what, "given": given, "result": result}) + "\n")
    print(f"{what}: {time.monotonic() - start:.0f} s, {brief(result)}", file=sys.stderr)
    return result


def measure(args):
    """One row -> what it took and, of each direction such as "fr -> en", scores, outputs and references: one dict for
    something trained, a list of them for several draws of shots; of a sweep, the loss."""
    what = json.loads(args.row)
    tokenizer = Tokenizer.from_pretrained(args.model)
    context = GPT.from_pretrained(args.model).config.n_positions
    corpus = data.load([args.data], None, tokenizer, args.limit, context // 2)  # room for what is put in front
    if what["way"] not in TRAINED:
        draw = partial(measure_shots, args, what["way"], what["k"], tokenizer, corpus)
        return {"draws": [draw(seed) for seed in range(what["draws"])]}
    build = partial(TRAINED[what["way"]][0], args.model, tokenizer, corpus)
    if "sweep" in what:
        way = build()
        train(way, corpus, what["steps"], what["sweep"], args.batch_size)
        return {"validation_loss": validation_loss(way, corpus)}
    return measure_trained(args, build, corpus, what["steps"], what["lr"], what["seed"])


def measure_trained(args, build, corpus, steps, lr, seed):
    build()  # once for nothing: what it imports is no memory of the row's own
    peak = Peak(args.device)
    way = build()
    peak.reset()  # loading is over
    seconds = cpu_seconds(partial(train, way, corpus, steps, lr, args.batch_size, seed))[1]
    result = {"train_cpu_seconds": seconds, "peak_bytes": peak.bytes(), "validation_loss": validation_loss(way, corpus)}
    with tempfile.TemporaryDirectory() as directory:
        way.save(Path(directory))
        result["kept_bytes"] = sum(path.stat().st_size for path in Path(directory).iterdir())
    result["trained"] = sum(p.numel() for p in way.parameters())
    return result | answers(args, corpus, way.translate)


def measure_shots(args, way, k, tokenizer, corpus, seed):
    peak, kept, fewer = Peak(args.device), [], []
    model = GPT.from_pretrained(args.model)

    def translate(texts, source, target):
        s, t = (corpus.columns.index(name) for name in (source, target))
        if way in ("shots", "bare"):
            shots, _ = draw_shots(corpus, source, target, k, seed)
            shots.form = "lines" if way == "bare" else "names"
            kept.append(shots.text)
            return few_shot(model, tokenizer, shots, texts)
        pairs = [(corpus.text(row, s), corpus.text(row, t)) for row in corpus.rows("train")]
        kept[:] = ["\n".join(map("\t".join, pairs))]  # the same pairs serve both directions
        outputs, short = nearest_shots(model, tokenizer, pairs, texts, source, target, k)
        fewer.append(short)
        return outputs

    result = answers(args, corpus, translate)
    result |= {"trained": 0, "train_cpu_seconds": 0.0, "peak_bytes": peak.bytes()}
    return result | {"kept_bytes": len("".join(kept).encode()), "fewer": sum(fewer)}


def answers(args, corpus, translate):
    """Scores and outputs for each direction, and the CPU seconds that all of them took."""
    result = {"directions": {}, "outputs": {}, "references": {}, "answer_cpu_seconds": 0.0}
    for t, s in ((0, 1), (1, 0)):
        source, target = corpus.columns[s], corpus.columns[t]
        rows = new_sentences(corpus, s, t, args.sentences)
        sources, references = ([corpus.text(row, column) for row in rows] for column in (s, t))
        outputs, seconds = cpu_seconds(partial(translate, sources, source, target))
        references = [[text] for text in references]
        texts, cut = [output.text for output in outputs], sum(not output.finished for output in outputs)
        direction, result["answer_cpu_seconds"] = f"{source} -> {target}", result["answer_cpu_seconds"] + seconds
        result["outputs"][direction], result["references"][direction] = texts, references
        scores = {name: metrics.METRICS[name](texts, references) for name in ("bleu", "chrf")}
        result["directions"][direction] = scores | {"sentences": len(texts), "cut": cut}
    return result


def new_sentences(corpus, source, target, n):
    """Rows of the test split. Splits go by the first column, so a sentence of the other may stand in training, too,
    beside another translation: such rows are left out."""
    seen = [{corpus.text(row, column) for row in corpus.rows("train")} for column in range(len(corpus.columns))]
    test = corpus.examples("test")
    rows = test[(test[:, 1] == source) & (test[:, 2] == target), 0]
    new = [all(corpus.text(row, column) not in seen[column] for column in (source, target)) for row in rows]
    return sample_rows(rows[new], n)


def cpu_seconds(run):
    """(what run() returns, the seconds that this process computed meanwhile, all threads together)."""
    start = time.process_time()
    return run(), time.process_time() - start


# The table


def brief(result):
    """A result, or a table of them, without its sentences."""
    if isinstance(result, list):
        return list(map(brief, result))
    if isinstance(result, dict):
        return {key: brief(value) for key, value in result.items() if key not in SENTENCES}
    return result


def show(table):
    """As Markdown: means over seeds or draws, and the prefix's median seed against the median of each."""
    prefix = next(iter(table.values()))
    directions = list(prefix[0]["directions"])
    scores = [f"{metric}, {d}" for d in directions for metric in ("BLEU", "chrF")]
    head = ["", *scores, "trained", "kept on disk", "CPU s, training", "CPU s, answering", "peak MB"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, rows in table.items():
        found = [mean([r["directions"][d][metric] for r in rows]) for d in directions for metric in ("bleu", "chrf")]
        cost = [f"{rows[0]['trained']:,}", f"{rows[0]['kept_bytes'] / 1000:,.1f} kB"]
        cost += [f"{np.mean([row[what] for row in rows]):.0f}" for what in ("train_cpu_seconds", "answer_cpu_seconds")]
        cost.append(f"{rows[0]['peak_bytes'] / 1e6:.0f}")  # further draws find the memory of the first
        print(f"| {name} | " + " | ".join([*found, *cost]) + " |")
    print(f"\n| prefix − | {' | '.join(directions)} |\n|" + "---|" * (1 + len(directions)))
    for name, rows in list(table.items())[1:]:
        print(f"| {name} | " + " | ".join(compared(prefix, rows, direction) for direction in directions) + " |")


def mean(values):
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values):.1f}" if len(values) > 1 else "")


def compared(ours, theirs, direction):
    """BLEU of our median row less that of theirs, and whether 1,000 resamples of the sentences say the same."""
    median = lambda rows: sorted(rows, key=lambda row: row["directions"][direction]["bleu"])[len(rows) // 2]
    texts, other = median(ours)["outputs"][direction], median(theirs)["outputs"][direction]
    references = ours[0]["references"][direction]
    found = metrics.paired_bootstrap(metrics.METRICS["bleu"], texts, other, references)
    low, high = found["interval"]
    verdict = "significant" if found["p"] < 0.05 else "not significant"
    return f"{found['delta']:+.1f} ({low:+.1f} to {high:+.1f}), {verdict} (p = {found['p']:.3f})"


if __name__ == "__main__":
    main()
