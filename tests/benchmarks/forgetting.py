"""Is anything forgotten? A prefix, LoRA and fine-tuning learn one direction; how well does the model then do the rest?

    python tests/benchmarks/forgetting.py                                      the demo, en -> fr on the sample corpus
    python tests/benchmarks/forgetting.py --data short-tatoeba.en-fr.csv --limit 10600 --results forgetting.jsonl

A table of losses (nats per token) on the test split: the direction that was learned, the one back, and plain text of both
languages. Each way has its own best learning rate, by a sweep as in baselines.py, and asks for what it learned as it did
in training. All else is asked of every model in one form, which the base knows: a text after a newline, a pair in bare
lines. With its banks closed a prefix must leave the base's logits bit for bit, else the script ends with an error.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, which has a train.py of its own

from baselines import TRAINED
from common import best_rate, circumstances
from ways import train, validation_loss

from minigpt import GPT, Tokenizer
from minigpt.attention import PackedBatch
from minigpt.loss import nll_sum
from prefix.batches import in_directions
from prefix.data import corpus as data
from prefix.run import DEMO_CORPUS
from prefix.sequences import pack_pairs, pairs_of, separator

WAYS = ("prefix", "LoRA", "fine-tuning")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a checkpoint's directory (the demo)")
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--columns", nargs=2, default=["en", "fr"], help="the direction to learn (en fr)")
    parser.add_argument("--limit", type=int, help="read no more than this many usable pairs")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sweep-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--results", type=Path, help="add the table to this file, as a line of JSON")
    return parser.parse_args()


@torch.no_grad()
def loss(model, tokenizer, examples, banks=None, batch_size=64):
    """The mean negative log likelihood of the targets, in bare lines; with `banks`, those of each pair are open."""
    total, n_targets = 0.0, 0
    for i in range(0, len(examples), batch_size):
        batch = pack_pairs(examples[i : i + batch_size], separator(tokenizer), tokenizer.eot)
        packed = batch.packed if banks else PackedBatch(batch.packed.lengths)
        hidden = model.hidden(batch.ids, packed, banks and banks.slots())  # (N, n_embd)
        total += float(nll_sum(hidden[batch.target_index], model.wte.weight, batch.targets))
        n_targets += len(batch.targets)
    return total / n_targets


def main():
    args = parse_arguments()
    base, tokenizer = GPT.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    corpus = data.load([args.data], args.columns, tokenizer, args.limit, base.config.n_positions // 2)
    s, t = map(corpus.columns.index, args.columns)
    test, back = (in_directions(corpus.examples("test"), [ends]) for ends in ((s, t), (t, s)))
    asked = {"back": pairs_of(corpus, back)} | {  # plain text: a target without a source
        name: [([], corpus.ids(row, column), column, column) for row, _, _ in test]
        for name, column in zip(args.columns, (s, t))
    }
    others = lambda model, banks=None: {name: loss(model, tokenizer, pairs, banks) for name, pairs in asked.items()}

    def trained(name, steps, lr):
        way = TRAINED[name][0](args.model, tokenizer, corpus)
        train(way, corpus, steps, lr, args.batch_size, examples=in_directions(corpus.examples("train"), [(s, t)]))
        return way

    def trained_at_its_best_rate(name):
        validation = in_directions(corpus.examples("validation"), [(s, t)])
        sweep = lambda lr: validation_loss(trained(name, args.sweep_steps, lr), corpus, validation)
        lr = best_rate(TRAINED[name][1], sweep)
        return trained(name, args.steps, lr), lr

    table = {"base": {"learned": loss(base, tokenizer, pairs_of(corpus, test)), **others(base)}}
    for name in WAYS:
        way, lr = trained_at_its_best_rate(name)
        learned = {"learned": validation_loss(way, corpus, test)}
        if name == "prefix":
            check_unchanged(way, base, tokenizer)
            table["prefix, banks closed"] = {"learned": table["base"]["learned"], **others(way.model)}
            table[f"prefix, banks open, lr {lr:g}"] = learned | others(way.model, way.banks)
        else:
            table[f"{name}, lr {lr:g}"] = learned | others(way.tuned)
    first, second = args.columns
    print(f"|  | {first} → {second} (learned) | {second} → {first} | text, {first} | text, {second} |\n|---|---|---|---|---|")
    for name, losses in table.items():
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in losses.values())} |")
    line = json.dumps({"table": table, "sentences": len(test), "settings": vars(args) | circumstances("cpu")}, default=str)
    print(line)
    if args.results:
        with args.results.open("a") as file:
            file.write(line + "\n")


def check_unchanged(way, base, tokenizer):
    """After training, the weights beside the slots and the logits with closed banks are the base's, bit for bit."""
    ids = torch.randint(tokenizer.n_vocab, (2, 50))
    theirs, ours = base.state_dict(), way.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs), "training changed the base"
    assert torch.equal(way.banks.logits(way.model, ids, open=()), base(ids)), "a closed bank changes the logits"


if __name__ == "__main__":
    main()
