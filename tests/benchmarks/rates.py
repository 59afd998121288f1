"""One learning rate for all bases: validation loss by base, start, number of slots, steps and rate.

    python tests/benchmarks/rates.py --model demo DIR DIR --results rates.jsonl
    python tests/benchmarks/rates.py --inits text --prefix-len 10 20 50 100 --steps 100

Every run trains as train.py does, on the sample corpus, and is measured with the slots of its last step. Where the best
rate stands at the edge of --rates, the next one is tried, too. Results go to a file of JSON lines as they come; a sweep
that was interrupted, or another process that shares the file, goes on from there.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # before this folder, which has a train.py of its own

from common import RATES

from minigpt import GPT, Tokenizer
from prefix import cli, run
from prefix.batches import BatchLoader
from prefix.data import corpus as data
from prefix.init import INITS, initial_banks
from prefix.trainer import Settings, Trainer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["demo"], help="checkpoints' directories (the demo)")
    parser.add_argument("--inits", nargs="+", choices=INITS, default=INITS)
    parser.add_argument("--prefix-len", nargs="+", type=int, default=[10])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 300])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.1, 0.3])
    parser.add_argument("--reparam", action="store_true")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(cli.DTYPES), default="float32")
    parser.add_argument("--attention", choices=["auto", "fused", "plain"], default="auto")
    parser.add_argument("--results", type=Path, default=Path("rates.jsonl"))
    return parser.parse_args()


def sweep(args, name):
    """All runs of one base that --results does not have."""
    model, tokenizer = GPT.from_pretrained(name, args.device, cli.DTYPES[args.dtype]), Tokenizer.from_pretrained(name)
    model.attention = args.attention
    corpus = data.load([run.DEMO_CORPUS], ("en", "fr"), tokenizer, max_tokens=model.config.n_positions)
    for steps, init, prefix_len in itertools.product(args.steps, args.inits, args.prefix_len):
        spec = dict(model=Path(name).name, fingerprint=model.fingerprint, dtype=args.dtype, batch_size=args.batch_size)
        spec |= dict(init=init, reparam=args.reparam, prefix_len=prefix_len, steps=steps)
        loss_of, rates = {}, set(args.rates)
        while new := rates - loss_of.keys():
            loss_of |= {lr: measured(args.results, spec | {"lr": lr}, model, tokenizer, corpus) for lr in new}
            at = RATES.index(min(loss_of, key=loss_of.get))
            rates |= {RATES[at - 1], RATES[min(at + 1, len(RATES) - 1)]}


def measured(results, spec, model, tokenizer, corpus):
    """The validation loss of a run, from the file of results if it is there."""
    for line in results.read_text().splitlines() if results.exists() else []:
        if (line := json.loads(line))["spec"] == spec:
            return line["loss"]
    began, s = time.monotonic(), spec["steps"]
    config = {"init": spec["init"], "prefix_len": spec["prefix_len"], "reparam": spec["reparam"]}
    banks = initial_banks(config | {"position_offset": 0, "settings": {"seed": 0}}, model, tokenizer, corpus)
    settings = Settings(s, spec["lr"], spec["batch_size"], warmup=s // 20)
    trainer = Trainer(model, banks, BatchLoader(corpus, tokenizer, settings, model.device), settings, None)
    line = {"spec": spec, "base_loss": trainer.validation_loss(base=True), "start": trainer.validation_loss()}
    for batch in trainer.loader.steps(0, s):
        trainer.optimizer_step(batch)
    loss = trainer.validation_loss()
    line |= {"loss": loss if math.isfinite(loss) else 1e9, **banks.moved()}
    line["seconds"] = round(time.monotonic() - began, 1)
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), file=sys.stderr, flush=True)
    return line["loss"]


def table(lines):
    """A row for each base, start, number of slots and steps; a column for each rate."""
    rows, rates = {}, sorted({line["spec"]["lr"] for line in lines})
    for line in lines:
        s = line["spec"]
        start = s["init"] + ", --reparam" * s["reparam"]
        rows.setdefault((s["model"], start, s["prefix_len"], s["steps"]), {})[s["lr"]] = line["loss"]
    yield f"| base | start | slots | steps | {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield "|---" * (4 + len(rates)) + "|"
    for key, losses in sorted(rows.items()):
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        best = rates.index(min(losses, key=losses.get))
        cells[best] = f"**{cells[best]}**"
        yield f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |"


def main():
    args = parse_arguments()
    for name in args.model:
        sweep(args, name)
    print("\n".join(table([json.loads(line) for line in args.results.read_text().splitlines()])))


if __name__ == "__main__":
    main()
