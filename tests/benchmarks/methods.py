"""Where slots start, what moves them, how many there are, and how many pairs they learn from: loss and BLEU after
equal steps.

    python tests/benchmarks/methods.py --data tatoeba.en-fr.tsv           all tables, three seeds
    python tests/benchmarks/methods.py --tables start --seeds 1           one of them, quickly

Every run trains as train.py does, but takes the slots of its last step. What is reported is measured on sentences of
--data that neither the base nor the slots have seen, both sides under 60 characters: the loss on pairs of its validation
split, BLEU (greedy, both directions) on pairs of its test split. Each line of a table gets its own learning rate, the
best for it after as many steps (seed 0, by the loss on other pairs of that validation split): of 1, 3, 10, 30 ..., three,
and the next one for as long as the best stands at the edge. Results go to a file of JSON lines as they come; a table
that was interrupted goes on from there. Beside it stays the file of those sentences.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, which has a train.py of its own

from common import best_rate, circumstances
from ways import FineTuning, train, validation_loss

from minigpt import GPT, Tokenizer
from minigpt.files import replacing
from prefix import cli
from prefix.banks import Banks
from prefix.batches import BatchLoader
from prefix.data import corpus as data
from prefix.data.corpus import sample_rows
from prefix.data.rows import Skipped, read_rows
from prefix.data.splits import split_of
from prefix.evaluation import metrics
from prefix.init import initial_banks, random_banks
from prefix.reparam import Reparametrised
from prefix.run import DEMO_CORPUS
from prefix.trainer import Settings, Trainer
from prefix.translation import Decoding, translate

LONGEST = 60  # characters of either side, of the sentences that are reported on
MIDDLE = {"slots": 1e-1, "network": 3e-3, "fine-tuning": 1e-4}  # of the first three learning rates, by what is trained
INITS = ["text", "random", "zero-effect"]
LENGTHS = [1, 2, 5, 10, 20, 50, 100]
PAIRS = [100, 300, 1000, None]  # None: all


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--data", default=str(DEMO_CORPUS), help="held-out sentences (the sample corpus)")
    parser.add_argument("--train-data", default=str(DEMO_CORPUS), help="training pairs (the sample corpus)")
    parser.add_argument("--model", default="demo", help="a checkpoint's directory (the demo)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=200, help="for BLEU, in each direction")
    parser.add_argument("--dtype", choices=list(cli.DTYPES), default="float32")
    parser.add_argument("--results", type=Path, default=Path("methods.jsonl"))
    return parser.parse_args()


class Bench:
    """Trains and measures a prefix for each spec that it is asked for, once."""

    def __init__(self, args):
        self.args = args
        self.model = GPT.from_pretrained(args.model, dtype=cli.DTYPES[args.dtype])
        self.tokenizer = Tokenizer.from_pretrained(args.model)
        self.corpus = data.load([args.train_data], ("en", "fr"), self.tokenizer, max_tokens=256)
        held_out = data.load([new_pairs(args.data, args.results.parent)], ("en", "fr"), self.tokenizer, max_tokens=256)
        examples = held_out.examples("validation")
        halves = {"choice": examples[examples[:, 0] % 2 == 0], "loss": examples[examples[:, 0] % 2 == 1]}
        self.validation = {name: sample_rows(half, 1000) for name, half in halves.items()}
        rows = sample_rows(np.array(list(held_out.rows("test"))), args.sentences)
        self.held_out, self.texts = held_out, [[held_out.text(row, column) for row in rows] for column in (0, 1)]
        lines = args.results.read_text().splitlines() if args.results.exists() else []
        self.done = {json.dumps(line["spec"]): line for line in map(json.loads, lines)}

    def run(self, **spec):
        """A line of results: spec, loss, the loss for the choice of a rate, seconds, and BLEU of fr -> en and en -> fr.
        way: "slots" or "fine-tuning"; lr, init and so on as options of train.py; pairs: how many to learn from; plain:
        the network as Li and Liang have it, without a start."""
        a = self.args
        common = dict(model=self.model.fingerprint, data=a.data, train_data=a.train_data, dtype=a.dtype)
        common |= dict(steps=a.steps, batch_size=a.batch_size, sentences=a.sentences)
        default = dict(way="slots", init="text", reparam=False, plain=False, prefix_len=10, pairs=None, seed=0)
        spec = default | spec | common
        key = json.dumps(spec)
        if key not in self.done:
            began = time.monotonic()
            result = {"spec": spec} | (self.fine_tuned(spec) if spec["way"] == "fine-tuning" else self.trained(spec))
            result["seconds"] = round(time.monotonic() - began, 1)
            with open(a.results, "a") as file:
                file.write(json.dumps(result) + "\n")
            self.done[key] = result
            print(key, {name: value for name, value in result.items() if name != "spec"}, file=sys.stderr, flush=True)
        return self.done[key]

    def trained(self, spec):
        options = dict(steps=spec["steps"], lr=spec["lr"], batch_size=spec["batch_size"], warmup=spec["steps"] // 20)
        options |= {"seed": spec["seed"]}
        settings = Settings(**options, eval_every=0)
        config = {name: spec[name] for name in ("init", "reparam", "prefix_len")}
        config |= {"position_offset": 0, "settings": options}
        banks = initial_banks(config, self.model, self.tokenizer, self.corpus)
        if spec["plain"]:
            banks = as_in_the_paper(banks, spec["seed"])
        with tempfile.TemporaryDirectory() as out:
            trainer = self.trainer(banks, self.corpus, settings, out)
            if spec["pairs"]:
                trainer.loader.train = trainer.loader.train[: 2 * spec["pairs"]]  # each pair, in both directions
            if not trainer.run():
                sys.exit("stopped")
            return self.measure(Banks.load(out, self.model))

    def trainer(self, banks, corpus, settings, out):
        loader = BatchLoader(corpus, self.tokenizer, settings, self.model.device)
        return Trainer(self.model, banks, loader, settings, out)

    def measure(self, banks):
        with tempfile.TemporaryDirectory() as out:
            trainer, result = self.trainer(banks, self.held_out, Settings(1, 0.0), out), {}
        for name, trainer.loader.validation in self.validation.items():
            result[name] = trainer.validation_loss()
        decoding = Decoding(batch_size=64)
        ours = lambda texts, *direction: translate(self.model, self.tokenizer, banks, texts, direction, decoding)
        return result | self.scores(ours)

    def fine_tuned(self, spec):
        """All weights, in float32; the languages' names say what is wanted, so its loss is that of another text."""
        a, way = self.args, FineTuning(self.args.model, self.tokenizer, self.corpus)
        examples = self.corpus.examples("train")[: spec["pairs"] and 2 * spec["pairs"]]  # both directions of each
        train(way, self.corpus, a.steps, spec["lr"], a.batch_size, spec["seed"], examples)
        losses = {name: validation_loss(way, self.held_out, half) for name, half in self.validation.items()}
        return losses | self.scores(way.translate)

    def scores(self, translate):
        """BLEU of translate(texts, source, target) in both directions."""
        result, texts = {}, dict(zip(("en", "fr"), self.texts))
        for source, target in (("fr", "en"), ("en", "fr")):
            outputs = translate(texts[source], source, target)
            result[f"{source} -> {target}"] = metrics.METRICS["bleu"]([output.text for output in outputs], [[text] for text in texts[target]])
        return result

    def best(self, **spec):
        """The spec with the learning rate that has the least loss."""
        kind = "network" if spec.get("reparam") else spec.get("way", "slots")
        return spec | {"lr": best_rate(MIDDLE[kind], lambda lr: self.run(**spec, lr=lr)["choice"])}

    def row(self, **spec):
        """Mean and standard deviation over the seeds -> {"loss": (mean, sd), ...}, with the spec."""
        results = [self.run(**spec, seed=seed) for seed in range(self.args.seeds)]
        around = lambda values: [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
        return spec | {name: around([r[name] for r in results]) for name in ("loss", "fr -> en", "en -> fr")}

    def without_slots(self):
        """The row of the base itself."""
        result = self.measure(random_banks(self.model.config, ("en", "fr"), 0))
        return {"name": "no slots at all", "lr": None} | {name: [value] for name, value in result.items()}


def new_pairs(path, folder):
    """A copy, in this folder, of a table's pairs whose sides in English and French are both short, without those of its
    validation and test splits whose French stands in its training split beside another English sentence."""
    new = folder / f"short-{Path(path).stem}.csv"
    if not new.exists():
        pairs = [pair for _, pair in read_rows([path], ("en", "fr"), Skipped())]
        trained = {fr for en, fr in pairs if split_of(en) == "train"}
        pairs = [pair for pair in pairs if max(map(len, pair)) < LONGEST]
        kept = [(en, fr) for en, fr in pairs if split_of(en) == "train" or fr not in trained]
        with replacing(new) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("en", "fr"), *kept])
    return str(new)


def as_in_the_paper(banks, seed):
    """The network alone: slots start where its random weights put them."""
    empty = {name: [torch.zeros_like(side) for side in pair] for name, pair in zip(banks.names, banks.key_values())}
    banks = Reparametrised(Banks(empty), seed=seed).to(banks.key[0].device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        banks.network[-1].reset_parameters()
    return banks


# The tables


def starts(bench):
    """Where the slots start, and whether they are moved through a network."""
    rows = [bench.without_slots()]
    for reparam, init in itertools.product((False, True), INITS):
        rows.append(bench.row(**bench.best(init=init, reparam=reparam)) | {"name": init + ", --reparam" * reparam})
    rows.append(bench.row(**bench.best(reparam=True, plain=True)) | {"name": "the network alone, as in the paper"})
    return "--init", rows


def lengths(bench):
    """How many slots a bank has, for two ways to start."""
    specs = [dict(init=init, reparam=False, prefix_len=n) for init in ("text", "zero-effect") for n in LENGTHS]
    return "--prefix-len", [
        bench.row(**bench.best(**spec)) | {"name": "{init}, {prefix_len}".format(**spec)} for spec in specs
    ]


def amounts(bench):
    """How many pairs there are to learn from, for slots (--init text) and for all weights."""
    everything, rows = len(bench.corpus.examples("train")) // 2, []
    for way, n in itertools.product(("slots", "fine-tuning"), PAIRS):
        spec = bench.best(init="text", reparam=False, way=way, pairs=n)
        rows.append(bench.row(**spec) | {"name": f"{way}, {n or everything:,}"})
    return "pairs", rows


TABLES = {"start": starts, "length": lengths, "pairs": amounts}


def markdown(title, rows):
    lines = [f"| {title} | --lr | held-out loss | BLEU fr → en | BLEU en → fr |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [" ± ".join(f"{x:.4f}" for x in row["loss"])]
        cells += [" ± ".join(f"{x:.1f}" for x in row[name]) for name in ("fr -> en", "en -> fr")]
        lines.append(f"| {row['name']} | {row['lr'] or '-'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    args = parse_arguments()
    bench, found = Bench(args), {}
    for name in args.tables:
        title, found[name] = TABLES[name](bench)
        print(f"{TABLES[name].__doc__}\n\n{markdown(title, found[name])}\n", flush=True)
    print(json.dumps({"tables": found, **circumstances("cpu")}))


if __name__ == "__main__":
    main()
