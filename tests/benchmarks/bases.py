"""Other bases than the demo, for rates.py: three small GPT-2s of other sizes and another upbringing.

    python tests/benchmarks/bases.py --data tatoeba.en-fr.tsv:1 tatoeba.en.txt:1 ... --out DIR

    small      2 layers of 128, heads of 32     all the files
    deep       8 layers of 128, heads of 64     all but the first file, and other numbers at random
    english    4 layers of 192, heads of 32     the English lists (*.en.txt) alone: it never sees a translation

Each is trained as prefix/demo/pretrain.py trains the demo, but in batches of 4,096 tokens, with the demo's vocabulary, and
lands in DIR/NAME.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from minigpt import checkpoint
from prefix.demo import pretrain

SHAPES = {"small": (2, 128, 4), "deep": (8, 128, 2), "english": (4, 192, 6)}  # n_layer, n_embd, n_head


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE:WEIGHT")
    parser.add_argument("--tokens", default="10e6")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    args = parser.parse_args()
    demo, alone = pretrain.CONFIG, pretrain.ALONE
    pretrain.build_vocabulary = copy_vocabulary
    pretrain.BATCH_TOKENS, pretrain.PEAK = 4096, 2e-3
    for name in args.only:
        first, *others = args.data
        unused = first.rpartition(":")[0] + ":0"  # only its held-out pairs count, for the loss that is logged
        english = [file for file in others if ".en.txt:" in file]
        n_layer, n_embd, n_head = SHAPES[name]
        pretrain.CONFIG = replace(demo, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
        pretrain.SEED = list(SHAPES).index(name) + 2
        pretrain.ALONE = [1.0, 1.0, 1.0] if name == "english" else alone
        files = {"small": args.data, "deep": [unused, *others], "english": [unused, *english]}[name]
        sys.argv = ["pretrain", "--data", *files, "--tokens", args.tokens, "--out", str(args.out / name)]
        pretrain.main()


def copy_vocabulary(pairs, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(checkpoint.DEMO / name, directory)


if __name__ == "__main__":
    main()
