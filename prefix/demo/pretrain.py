"""How minigpt/demo was made: a small bilingual GPT-2, pretrained from nothing on plain text.

    python -m prefix.demo.pretrain --data tatoeba.en-fr.tsv:8 tatoeba.en.txt:2 novels.en-fr.tsv:1 ... --out DIR

A data file is a table of sentences and their translations (.tsv, with a header) or a list of sentences (.txt); the
number behind it is the weight of its sentences. Documents are runs of sentences in one language; sentences
with their translations, in both directions and many layouts, nothing saying which language is which; and a few facts
with a text that repeats them, which teach copying. A sentence that split_of holds out is in none of them, on either side.

The learning rate warms up, stays, and falls to zero over the last COOLDOWN of --tokens. So a run may end at any time:
stop it, and start it again with fewer --tokens. It goes on exactly where DIR/state.pt was written.
Needs the `tokenizers` package (it comes with transformers) to build the vocabulary.
"""

import argparse
import copy
import csv
import json
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from minigpt import checkpoint
from minigpt.attention import Layout, attend
from minigpt.config import GPTConfig
from minigpt.files import replacing
from minigpt.model import GPT
from minigpt.splits import split_of
from minigpt.tokenizer import END_OF_TEXT, Tokenizer

CONFIG = GPTConfig(vocab_size=4096, n_positions=256, n_embd=256, n_layer=6, n_head=4)
BATCH_TOKENS, BLOCK, WARMUP, COOLDOWN, SEED = 4096, 4096, 0.02, 0.3, 1
MUON_LR, ADAM_LR = 0.01, 2e-3
LOG_EVERY = 100  # steps

# How a sentence and its translation may stand together: what is before, between and after them.
LAYOUTS = [("", "\n", "\n"), ("", "\n", "\n\n"), ("", " = ", "\n"), ("", " - ", "\n"), ("", " / ", "\n"),
           ("", "\t", "\n"), ("", " (", ")\n"), ('"', '" "', '"\n'), ("« ", " » « ", " »\n"), ("- ", "\n- ", "\n\n"),
           ("", " -> ", "\n"), ("", " | ", "\n"), ("", " : ", "\n"), ("* ", "\n  ", "\n"), ("> ", "\n", "\n"),
           ("", " ", "\n"), ("(", ") ", "\n")]  # fmt: skip
TABLES = [(" : ", " | "), (": ", ", "), ("[", "], "), (" = ", "; "), (": ", "\t"), ("=", " & ")]
LABELS = "A B C D X Y Z a b x y 1 2 3 i ii P Q R K L M N T".split()  # arbitrary, and never the same language twice


def main():
    args = parse_arguments()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sources, held_out = read_sources(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "merges.txt").exists():
        build_vocabulary(sources, args.out)
    tokenizer = Tokenizer.from_pretrained(args.out)
    run = Run(device)
    if (args.out / "state.pt").exists():
        run.load(args.out / "state.pt")
    validation = list(batches([f"{a}\n{b}" for pair in held_out for a, b in (pair, pair[::-1])], tokenizer))
    losses, start = [], time.monotonic()
    while run.progress["tokens"] < args.tokens:
        documents = make_documents(sources, random.Random(f"{SEED} {run.progress['block']}"))
        todo = list(batches(documents, tokenizer, random.Random(run.progress["block"])))
        for batch in todo[run.progress["batch"] :]:
            losses.append(run.step(batch, schedule(run.progress["tokens"] / args.tokens)))
            run.progress["batch"] += 1
            done = run.progress["tokens"] >= args.tokens
            if run.progress["step"] % LOG_EVERY == 0 or done:
                run.progress["seconds"] += time.monotonic() - start
                start = time.monotonic()
                line = run.progress | {"loss": torch.stack(losses).mean().item(), "val_loss": run.evaluate(validation)}
                losses = []
                print(json.dumps(line), flush=True)
                with open(args.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                run.save(args.out / "state.pt")
                checkpoint.save(run.model, args.out, torch.float16)
            if done:
                return
        run.progress["block"], run.progress["batch"] = run.progress["block"] + 1, 0


def parse_arguments():
    parser = argparse.ArgumentParser(description="Pretrain the demo checkpoint.")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE:WEIGHT")
    parser.add_argument("--tokens", type=float, default=60e6, help="to train on, all in all")
    parser.add_argument("--device", help="a GPU if there is one, else the CPU")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def read_sources(files):
    """-> ([(sentences or pairs, weight of all of them)], 1000 held-out pairs). Both sides of a pair count."""
    tables, held_out = {}, set()
    for name in files:
        name, weight = name.rsplit(":", 1)
        with open(name, encoding="utf-8", newline="") as file:
            rows = [tuple(row) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
        tables[name] = rows[1:] if name.endswith(".tsv") else rows, float(weight)
        held_out.update(text for row in tables[name][0] if {split_of(text) for text in row} != {"train"} for text in row)
    sources = []
    for name, (rows, weight) in tables.items():
        kept = [row for row in rows if held_out.isdisjoint(row)]
        sources.append((kept, weight * len(kept)))
        print(name, len(rows), len(kept))
    first = next(iter(tables.values()))[0]
    return sources, [row for row in first if split_of(row[0]) == "validation"][:400]


def build_vocabulary(sources, directory):
    """Learn the byte-level BPE merges and write vocab.json and merges.txt, <|endoftext|> last as in GPT-2."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=CONFIG.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    rows = (row for rows, _ in sources for row in rows if len(row) == 2)
    bpe.train_from_iterator((" " * (i % 2) + text for i, row in enumerate(rows) for text in row), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = {**trained["vocab"], END_OF_TEXT: len(trained["vocab"])}
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in trained["merges"])
    for name, text in (("vocab.json", json.dumps(vocab, ensure_ascii=False)), ("merges.txt", merges)):
        with replacing(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def make_documents(sources, rng):
    """BLOCK documents: runs of one language, sentences with their translations, and a few of facts."""
    pairs, alone = ([source for source in sources if len(source[0][0]) == n] for n in (2, 1))
    for _ in range(BLOCK):
        kind = rng.random()
        if kind < SHARES[0] and alone:
            (rows, _) = rng.choices(alone, [w for _, w in alone])[0]
            yield rng.choice([" ", " ", "\n"]).join(row[0] for row in rng.choices(rows, k=rng.randint(1, 6)))
            continue
        rows, _ = rng.choices(pairs, [w for _, w in pairs])[0]
        side = rng.choice([1, -1])
        chosen = [row[::side] for row in rng.choices(rows, k=1 if rng.random() < 0.7 else rng.randint(2, 6))]
        if kind > 1 - SHARES[1]:
            yield facts_and_text([row[0] for row in chosen], rng)
            continue
        if rng.random() < 0.1:  # as people type
            chosen = [(a.rstrip(" .!?\u00a0\u202f"), b.rstrip(" .!?\u00a0\u202f")) for a, b in chosen]
        yield lay_out([renamed(*row, rng) if rng.random() < 0.15 else row for row in chosen], rng)


SHARES = 0.2, 0.06


def lay_out(pairs, rng):
    """Pairs in one layout, most often on two lines."""
    kind = rng.random()
    before, between, after = LAYOUTS[0] if kind < 0.4 else rng.choice(LAYOUTS)
    if kind > 0.9:
        first, second = rng.sample(LABELS, 2)
        before, between, after = f"{first}: ", f"\n{second}: ", rng.choice(["\n", "\n\n"])
    text = "".join(before + a + between + b + after for a, b in pairs)
    return text.strip() if rng.random() < 0.8 else text


def renamed(a, b, rng):
    """The pair with a name or number that both sides share replaced by another."""
    shared = sorted(set(NAME.findall(a)) & set(NAME.findall(b)))
    if not shared:
        return a, b
    old = rng.choice(shared)
    new = str(rng.randrange(10 ** len(old))) if old.isdigit() else invented_name(rng)
    return re.sub(rf"\b{old}\b", new, a), re.sub(rf"\b{old}\b", new, b)


NAME = re.compile(r"\b[A-Z][a-z]{2,}\b|\b[0-9]+\b")


def facts_and_text(sentences, rng):
    """Facts and the text that they are taken from, in one of TABLES; one value is often a name that can only be copied."""
    equals, joint = rng.choice(TABLES)
    keys, examples = ["".join(invented_name(rng).lower().split()) for _ in range(6)], []
    for sentence in sentences:
        words = sentence.split()
        if rng.random() < 0.7:
            words[rng.randrange(len(words))] = invented_name(rng)
        cuts = sorted(rng.sample(range(len(words) + 1), min(len(words) + 1, 2 * rng.randint(1, 6))))
        values = [" ".join(words[i:j]).strip(" .,!?") for i, j in zip(cuts[::2], cuts[1::2])]
        facts = [key + equals + value for key, value in zip(keys, values) if value]
        examples.append(joint.join(facts) + "\n" + " ".join(words) + "\n")
    return "\n".join(examples).strip()


def invented_name(rng):
    """One or two capitalised words that mean nothing."""
    words = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        syllables = [rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
        words.append("".join(syllables) + rng.choice(["", "n", "s", "r", "lly", "zzi", "tt", "ll"]))
    return " ".join(word.capitalize() for word in words)


def batches(texts, tokenizer, rng=None):
    """Yield ids (N,), targets (N,) and the documents' lengths: documents of like length together, N near BATCH_TOKENS."""
    rows = sorted(([*tokenizer.encode(text)[: CONFIG.n_positions - 1], tokenizer.eot] for text in texts), key=len)
    cut, n = [[]], 0
    for row in rows:
        if n + len(row) > BATCH_TOKENS:
            cut.append([])
            n = 0
        cut[-1].append(row)
        n += len(row)
    if rng:
        rng.shuffle(cut)
    for batch in cut:
        ids = torch.tensor([i for row in batch for i in row])
        targets = torch.tensor([i for row in batch for i in [*row[1:], -100]])
        yield ids, targets, [len(row) for row in batch]


def schedule(progress):
    """Warm-up, constant, linear cool-down; progress is the share of the tokens that are done."""
    return min(1.0, (progress + 1e-4) / WARMUP, max(0.0, (1 - progress) / COOLDOWN))


class Run:
    """Weights in float32, a copy of them in the dtype of the computation, the optimizers, and how far they are."""

    def __init__(self, device):
        torch.manual_seed(SEED)
        self.model = GPT(CONFIG)
        initialise(self.model)
        self.model.to(device)
        self.compute = copy.deepcopy(self.model).to(torch.bfloat16)
        self.compute.attention = "plain" if device.type == "cpu" else "auto"
        hidden = [p for p in self.model.h.parameters() if p.dim() == 2]
        rest = [p for name, p in self.model.named_parameters() if p.dim() < 2 or not name.startswith("h.")]
        self.optimizers = [Muon(hidden, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)]
        self.rates = [MUON_LR, ADAM_LR]
        self.progress = {"step": 0, "block": 0, "batch": 0, "tokens": 0, "seconds": 0.0}

    def loss(self, batch):
        ids, targets, lengths = batch
        device = self.model.device
        layout = Layout(lengths, device=device)
        x = self.model.embed(ids.to(device), layout.position)  # in float32: its gradient is a long sum for common tokens
        hidden = self.compute.run(
            x.to(self.compute.dtype), lambda i, qkv: attend(qkv, CONFIG.n_head, layout, how=self.compute.attention)
        )
        counted = (targets >= 0).nonzero()[:, 0].to(device)
        logp = F.log_softmax(self.compute.logits(hidden[counted]), dim=-1, dtype=torch.float32)
        return -logp.gather(1, targets.to(device)[counted, None]).mean()

    def step(self, batch, share):
        loss = self.loss(batch)
        loss.backward()
        for p, q in zip(self.model.parameters(), self.compute.parameters()):
            if q.grad is not None:
                p.grad = q.grad.float() if p.grad is None else p.grad + q.grad
            q.grad = None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.copy_weights()
        self.progress["step"] += 1
        self.progress["tokens"] += len(batch[0])
        return loss.detach()

    @torch.no_grad()
    def copy_weights(self):
        for p, q in zip(self.model.parameters(), self.compute.parameters()):
            q.copy_(p)

    @torch.no_grad()
    def evaluate(self, validation):
        counts = torch.tensor([float((targets >= 0).sum()) for _, targets, _ in validation])
        return float(torch.stack([self.loss(batch).cpu() for batch in validation]) @ counts / counts.sum())

    def save(self, path):
        with replacing(path) as temporary:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "progress": self.progress}, temporary)

    def load(self, path):
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.progress = state["progress"]
        self.copy_weights()


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan et al. 2024): every direction moves as far."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - 0.05 * group["lr"]).sub_(update, alpha=group["lr"] * max(1, p.size(1) / p.size(0)) ** 0.5)


def orthogonal(x, steps=5):
    """The nearest orthogonal matrix to x, roughly: all singular values near 1, by Newton-Schulz iterations."""
    y = (x.T if x.size(0) > x.size(1) else x).bfloat16()
    y = y / (y.norm() + 1e-7)
    for _ in range(steps):
        a = y @ y.T
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.T if x.size(0) > x.size(1) else y).to(x.dtype)


def initialise(model):
    """As GPT-2 was: normal(0, 0.02), and smaller where a projection adds to the residual stream (section 2.3)."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif p.dim() == 2:
            residual = name.endswith("c_proj.weight")
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * CONFIG.n_layer) if residual else 0.02)


if __name__ == "__main__":
    main()
