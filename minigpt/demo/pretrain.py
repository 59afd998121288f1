"""How the demo checkpoint was made: a small bilingual GPT-2, pretrained from nothing on sentences as text.

    python -m minigpt.demo.pretrain --data tatoeba.en-fr.tsv --minutes 92
    python -m minigpt.demo.pretrain --data tatoeba.en-fr.tsv --extra prefix/demo/en-fr.csv \\
                                    --go-on --minutes 8 --peak 3.75e-4
    python -m minigpt.demo.pretrain --data tatoeba.en-fr.tsv --extra prefix/demo/en-fr.csv \\
                                    --go-on --minutes 55 --peak 1e-3 --skills 0.6

(Stages one and two were made by this file as of commit d6968ce, in batches of 2,048 tokens.) The text is runs of
sentences in one language, and inputs with their outputs, one or several in a document: in the first two stages the
output is always the translation, in many layouts, in both directions, with no word that says which. In the third, three
in five documents with examples want something else: a copy, the last word, the words backwards or put in order,
capitals, a list of facts from a text, a text from facts. So the result can do several things, and does not know which
of them is wanted until it is shown. Showing it is the prefix's work. Facts with names that nobody has heard teach it to
copy. A fourth stage, which does not ship, teaches it more of that, for table-to-text:

    python -m minigpt.demo.pretrain --data tatoeba.en-fr.tsv --go-on --minutes 15 --peak 6e-4 --skills 0.9 --copying \\
                                    --out a-copy-of-the-demo

The learning rate follows the clock, not a step count, so that a slower machine makes a weaker model on time.
Needs the `tokenizers` package (it comes with transformers) to build the vocabulary.
"""

import argparse
import csv
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.files import UserError, replacing
from minigpt.model import GPT
from minigpt.tokenizer import END_OF_TEXT, Tokenizer
from prefix.data.splits import split_of

CONFIG = GPTConfig(vocab_size=4096, n_positions=256, n_embd=256, n_layer=6, n_head=4)
FLOOR, WARMUP, BATCH_TOKENS, SEED = 0.03, 0.02, 4096, 1

# How two translations may stand together: what is before, between and after them.
LAYOUTS = [
    ("", "\n", "\n"),
    ("", "\n", "\n\n"),
    ("", "\n", ""),
    ("", " = ", "\n"),
    ("", " - ", "\n"),
    ("", " / ", "\n"),
    ("", "\t", "\n"),
    ("", " (", ")\n"),
    ('"', '" "', '"\n'),
    ("« ", " » « ", " »\n"),
    ("- ", "\n- ", "\n\n"),
    ("", " -> ", "\n"),
    ("", " | ", "\n"),
    ("", " : ", "\n"),
    ("* ", "\n  ", "\n"),
    ("", "\n\n", "\n\n"),
    ("> ", "\n", "\n"),
    ("", " ", "\n"),
    ("(", ") ", "\n"),
    ("", " ... ", "\n"),
]
TABLES = [
    (" : ", " | ", ""),
    (": ", ", ", ""),
    ("[", "], ", "]"),
    (" = ", "; ", ""),
    (": ", "\t", ""),
    ("=", " & ", ""),
]
LABELS = "A B C D X Y Z a b x y 1 2 3 i ii P Q R K L M N T".split()  # arbitrary, and never the same language twice


def main():
    args = parse_arguments()
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    pairs, extra = read_pairs(args.data), read_pairs(args.extra)["train"] if args.extra else []
    if args.go_on:
        model, tokenizer = GPT.from_pretrained(args.out).requires_grad_(True), Tokenizer.from_pretrained(args.out)
    else:
        tokenizer = build_vocabulary(pairs["train"], args.out)
        model = GPT(CONFIG)
        initialise(model)
    model.attention = "plain"  # the faster one for short rows in bfloat16 on a CPU
    optimizer = make_optimizer(model)
    validation = [batch for batch in batches(direct_documents(pairs["validation"]), tokenizer)]
    start, step, tokens, losses = time.monotonic(), 0, 0, []
    next_save = args.save_every
    while (minutes := (time.monotonic() - start) / 60) < args.minutes:
        for ids, targets in batches(
            documents(pairs["train"], extra, args.skills, rng, 6000, args.copying), tokenizer, rng
        ):
            progress = (time.monotonic() - start) / 60 / args.minutes
            for group in optimizer.param_groups:
                group["lr"] = args.peak * schedule(progress)
            loss = lm_loss(model, ids, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + int((targets >= 0).sum())
            losses.append(loss.item())
            if progress >= 1:
                break
        minutes = (time.monotonic() - start) / 60
        log = {"minutes": round(minutes, 1), "step": step, "tokens": tokens, "loss": round(np.mean(losses[-200:]), 4)}
        if minutes >= next_save or minutes >= args.minutes:
            next_save += args.save_every
            log["val_loss"] = round(validation_loss(model, validation), 4)
            checkpoint.save(model, args.out, torch.float16)
        print(json.dumps(log), flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Pretrain the demo checkpoint.")
    parser.add_argument("--data", required=True, help="TSV or CSV with a header and two columns of translations")
    parser.add_argument("--extra", help="another such file, of which every thirtieth document is made")
    parser.add_argument("--go-on", action="store_true", help="from the checkpoint in --out")
    parser.add_argument("--skills", type=float, default=0, help="share of the examples that are not translations")
    parser.add_argument("--copying", action="store_true", help="the only skill is to tell facts full of invented names")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="the learning rate after warm-up")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--save-every", type=float, default=10, metavar="MINUTES")
    parser.add_argument("--out", type=Path, default=checkpoint.DEMO)
    return parser.parse_args()


def read_pairs(path):
    """{split: [(sentence, translation)]}, split by the first column; every 8th validation pair is enough to watch."""
    pairs = {"train": [], "validation": [], "test": []}
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file) if path.endswith(".csv") else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        for row in rows:
            pairs[split_of(row[0])].append(tuple(row))
    pairs["validation"] = pairs["validation"][::8]
    return pairs


def build_vocabulary(pairs, directory):
    """Learn the byte-level BPE merges and write vocab.json and merges.txt, <|endoftext|> last as in GPT-2."""
    try:
        from tokenizers import Tokenizer as Trainable
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("building a vocabulary needs: pip install tokenizers") from error
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((" " * (i % 2) + text for i, pair in enumerate(pairs) for text in pair), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = {**trained["vocab"], END_OF_TEXT: len(trained["vocab"])}
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in trained["merges"])
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, text in (("vocab.json", json.dumps(vocab, ensure_ascii=False)), ("merges.txt", merges)):
        with replacing(Path(directory) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return Tokenizer.from_pretrained(directory)


def documents(pairs, extra, skills, rng, n, copying=False):
    """n documents: a run of one language, or inputs with their outputs, all of one skill and in one layout. A share
    `skills` of the latter is no translation; with `copying`, all of it is to tell facts full of invented names."""
    everything = pairs
    words = sorted({word for pair in rng.choices(pairs, k=2000) for word in pair[0].split() if word.isalpha()})
    for _ in range(n):
        kind, pairs = rng.random(), extra if extra and rng.random() < 1 / 30 else everything
        if kind < 0.15:
            side, joint = rng.randrange(2), rng.choice([" ", " ", "\n"])
            yield joint.join(pair[side] for pair in rng.choices(pairs, k=rng.randint(1, 8)))
            continue
        chosen = rng.choices(pairs, k=1 if kind < 0.65 else rng.randint(2, 7))
        if rng.random() < 0.1:  # as people type
            chosen = [(a.rstrip(" .!?"), b.rstrip(" .!?\u00a0\u202f")) for a, b in chosen]
        if rng.random() < 0.5:
            chosen = [(b, a) for a, b in chosen]
        if rng.random() < skills:
            skill = told_of_names if copying else rng.choices(list(SKILLS), SKILLS.values())[0]
            chosen = skill([pair[0] for pair in chosen], words, rng)
        yield examples_as_text(chosen, rng)


def copied(sentences, words, rng):
    return [(sentence, sentence) for sentence in sentences]


def shouted(sentences, words, rng):
    return [(sentence, sentence.upper()) for sentence in sentences]


def reversed_words(sentences, words, rng):
    return [(sentence, " ".join(reversed(sentence.split()))) for sentence in sentences]


def unscrambled(sentences, words, rng):
    return [(" ".join(rng.sample(s.split(), len(s.split()))), s) for s in sentences]


def last_word(sentences, words, rng):
    return [(sentence, sentence.split()[-1]) for sentence in sentences]


def told(sentences, words, rng, names=(0, 0, 1, 1, 1)):
    """Facts, and a text that has them: the values are pieces of one to three sentences, and often one of them is a
    name that nobody has heard, so that it can only be copied. The keys mean nothing, but mean it for all examples."""
    equals, joint, end = rng.choice(TABLES)
    keys = [word.lower() for word in rng.sample(words, 6)]
    examples = []
    while sentences:
        n = rng.choice([1, 1, 2, 3])
        text, sentences = " ".join(sentences[:n]).split(), sentences[n:]
        for _ in range(rng.choice(names)):
            text[rng.randrange(len(text))] = invented_name(words, rng)
        cuts = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, 2 * rng.randint(1, 6))))
        values = [" ".join(text[i:j]).strip(" .,!?") for i, j in zip(cuts[::2], cuts[1::2])]
        facts = [key + equals + value for key, value in zip(keys, values) if value]
        if rng.random() < 0.5:
            rng.shuffle(facts)
        examples.append((joint.join(facts) + end, " ".join(text)))
    return examples


def told_of_names(sentences, words, rng):
    return told(sentences, words, rng, names=(1, 2, 3, 4))


def listed(sentences, words, rng):
    return [(text, facts) for facts, text in told(sentences, words, rng)]


def invented_name(words, rng):
    """One to three capitalised words, known or made up."""
    made_up = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    made_up += rng.choice(["", "n", "s", "r", "zzi", "tt", "ll"])
    name = rng.choice([[made_up], [made_up, rng.choice(words)], rng.choices(words, k=rng.randint(1, 3))])
    return " ".join(rng.choice([["The"], [], []]) + [word.capitalize() for word in name])


SKILLS = {told: 26, copied: 24, unscrambled: 12, listed: 10, reversed_words: 10, shouted: 10, last_word: 8}


def examples_as_text(examples, rng):
    """Inputs and outputs in one layout."""
    before, between, after = rng.choice(LAYOUTS)
    if rng.random() < 0.15:
        first, second = rng.sample(LABELS, 2)
        before, between, after = f"{first}: ", f"\n{second}: ", rng.choice(["\n", "\n\n"])
    text = "".join(before + given + between + answer + after for given, answer in examples)
    return text.strip() if rng.random() < 0.8 else text


def direct_documents(pairs):
    """Each pair on two lines, in both directions: what a prefix will ask for."""
    return [text for a, b in pairs for text in (f"{a}\n{b}", f"{b}\n{a}")]


def batches(texts, tokenizer, rng=None):
    """Yield ids and targets (B, T): documents of like length side by side, about BATCH_TOKENS in all."""
    rows = [tokenizer.encode(text)[: CONFIG.n_positions - 1] + [tokenizer.eot] for text in texts]
    rows.sort(key=len)
    cut, batch = [], []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > BATCH_TOKENS:
            cut.append(batch)
            batch = []
        batch.append(row)
    cut.append(batch)
    if rng:
        rng.shuffle(cut)
    for batch in cut:
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        targets = torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
            targets[i, : len(row) - 1] = ids[i, 1 : len(row)]
        yield ids, targets


def lm_loss(model, ids, targets):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model, validation):
    counts = [int((targets >= 0).sum()) for _, targets in validation]
    sums = [lm_loss(model, ids, targets).item() * n for (ids, targets), n in zip(validation, counts)]
    return sum(sums) / sum(counts)


def initialise(model):
    """As GPT-2 was: normal(0, 0.02), and smaller where a projection adds to the residual stream (section 2.3)."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif p.dim() == 2:
            residual = name.endswith("c_proj.weight")
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * CONFIG.n_layer) if residual else 0.02)


def make_optimizer(model):
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.98), fused=True)


def schedule(progress):
    """Linear warm-up, then a cosine down to FLOOR; progress is the share of the time that is spent."""
    if progress < WARMUP:
        return progress / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (min(progress, 1) - WARMUP) / (1 - WARMUP)))
    return FLOOR + (1 - FLOOR) * cosine


if __name__ == "__main__":
    main()
