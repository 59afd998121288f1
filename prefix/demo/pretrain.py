"""How minigpt/demo was made: a small bilingual GPT-2, pretrained from nothing on plain text.

    python -m prefix.demo.pretrain --data tatoeba.en-fr.tsv:1 tatoeba.fr.txt:1 books.en-fr.tsv:0.15 ... --out DIR

A file is a table of sentences and translations (.tsv or .csv, with a header) or a list of sentences (.txt); behind it
stands how often one of its sentences is drawn. documents.py says what is made of them. A run goes on exactly from
DIR/state.pt. So it may end at any time: stop it, and start it again with fewer --tokens. Processes beside it draw the
documents. It needs the `tokenizers` package (it comes with transformers), unless DIR holds a vocabulary already. On a CPU a
malloc that keeps its memory whole makes steps up to three times as fast:
LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=thp:always,dirty_decay_ms:5000,muzzy_decay_ms:5000
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from minigpt import GPT, GPTConfig, Tokenizer, checkpoint
from minigpt.attention import PackedBatch, to_device
from minigpt.backends import attend
from minigpt.files import replacing
from minigpt.tokenizer import END_OF_TEXT
from prefix.demo.documents import draw_documents, read_sources

# "gelu" is three times as fast as GPT-2's "gelu_new" in bfloat16 on a CPU, and nearly the same function.
CONFIG = GPTConfig(4096, n_positions=256, n_embd=256, n_layer=6, n_head=4, activation_function="gelu")
AT, RATES = [0, 0.02, 0.5, 1], [0, 1, 1, 0]  # shares of all tokens, and the rate there as a share of PEAK; linear in between
ALONE = 0.2, 0.05  # the share of documents that are runs in one language, in the first half of a run and in the second
FACTS = 0.06  # and that are facts with a text; all others are translations
PEAK, BATCH_TOKENS, LOG_EVERY, SEED = 4e-3, 32768, 60, 1  # LOG_EVERY: seconds
BLOCK, DOCUMENT = 4096, 47  # documents that are sorted by length together; tokens of one, on average


def main():
    parser = argparse.ArgumentParser(description="Pretrain the demo checkpoint.")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE:WEIGHT", help="held-out loss: on the first")
    parser.add_argument("--tokens", type=float, default=84.5e6, help="to train on, all in all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sources, held_out = read_sources(args.data)
    if not (args.out / "vocab.json").exists():
        build_vocabulary([row for rows, _ in sources for row in rows if len(row) == 2], args.out)
    tokenizer = Tokenizer.from_pretrained(args.out)
    held_out = [f"{a}\n{b}" for pair in held_out for a, b in (pair, pair[::-1])]
    train(Blocks(sources, tokenizer, args.tokens), batches(held_out, tokenizer), args)


def prepare(args):
    """-> the parts that a state has, and where a run stands: as DIR/state.pt says, or at the beginning."""
    torch.manual_seed(SEED)
    model = Pretraining(CONFIG).to(args.device)
    hidden = [p for p in model.h.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if p.dim() == 1 or not name.startswith("h.")]
    muon = torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    parts = {"model": model, "muon": muon, "adamw": torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)}
    at = {"step": 0, "tokens": 0, "seconds": 0.0, "block": 0, "batch": 0}
    if (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", map_location=args.device, weights_only=True)
        at = state.pop("at")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return parts, at


def build_vocabulary(pairs, directory):
    """Learn the byte-level BPE merges and write vocab.json and merges.txt, <|endoftext|> last as in GPT-2."""
    from tokenizers import ByteLevelBPETokenizer

    texts = (" " * (i % 2) + text for i, pair in enumerate(pairs) for text in pair)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=CONFIG.vocab_size - 1, min_frequency=0, show_progress=False)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as learned:
        vocab, merges = map(Path, bpe.save_model(learned))
        merges.replace(directory / "merges.txt")
        vocab = json.loads(vocab.read_text(encoding="utf-8"))
    with replacing(directory / "vocab.json") as temporary:  # the last: with it the vocabulary is whole
        temporary.write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}, ensure_ascii=False), encoding="utf-8")


def train(blocks, validation, args):
    """From where a run stands to args.tokens; now and then a line of log.jsonl, the state and the weights."""
    parts, at = prepare(args)
    model, *optimizers = parts.values()
    losses, start = [], time.monotonic()
    for batch in training_batches(blocks, at):
        loss = model.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = float(np.interp(at["tokens"] / args.tokens, AT, RATES))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = PEAK * rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        at |= {"step": at["step"] + 1, "tokens": at["tokens"] + len(batch[0])}
        if time.monotonic() - start >= LOG_EVERY or at["tokens"] >= args.tokens:
            with torch.no_grad():
                held_out_loss = sum(model.loss(*batch).item() for batch in validation) / len(validation)
            at["seconds"], start = at["seconds"] + time.monotonic() - start, time.monotonic()
            line = {**at, "loss": torch.stack(losses).mean().item(), "val_loss": held_out_loss}
            with open(args.out / "log.jsonl", "a") as log:
                print(json.dumps(line), file=log)
            losses = []
            with replacing(args.out / "state.pt") as temporary:
                torch.save({"at": at} | {name: part.state_dict() for name, part in parts.items()}, temporary)
            checkpoint.save(model, args.out, torch.float16)


def training_batches(blocks, at):
    """Yield batches from where `at` stands, and move its block and batch, until all tokens are done. Processes make the
    blocks ahead."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(12, max(1, cpus - 1))
    for block in DataLoader(blocks, None, sampler=count(at["block"]), num_workers=processes, collate_fn=list):
        for batch in block[at["batch"] :]:
            if at["tokens"] >= blocks.tokens:
                return
            at["batch"] += 1
            yield batch
        at |= {"block": at["block"] + 1, "batch": 0}


class Blocks(Dataset):
    """The batches of a run, by blocks of BLOCK documents. What is in one follows from its number."""

    def __init__(self, sources, tokenizer, tokens):
        self.sources, self.tokenizer, self.tokens = sources, tokenizer, tokens

    def __getitem__(self, number):
        """The batches of a block, in random order."""
        alone, rng = ALONE[number * BLOCK * DOCUMENT >= self.tokens / 2], random.Random(f"{SEED} {number}")
        block = batches(draw_documents(self.sources, BLOCK, alone, FACTS, rng), self.tokenizer)
        rng.shuffle(block)
        return block


def batches(texts, tokenizer):
    """-> [(ids (N,), targets (N,), lengths)]: texts of like length together, N at most BATCH_TOKENS; NumPy arrays."""
    rows = sorted(([*tokenizer.encode(text)[: CONFIG.n_positions - 1], tokenizer.eot] for text in texts), key=len)
    groups, total = [], math.inf
    for row in rows:
        total += len(row)
        if total > BATCH_TOKENS:
            groups.append([])
            total = len(row)
        groups[-1].append(row)
    ids = [np.concatenate(group).astype(np.int16) for group in groups]
    targets = [np.concatenate([[*row[1:], -100] for row in group]).astype(np.int16) for group in groups]
    return list(zip(ids, targets, [[len(row) for row in group] for group in groups]))


class Pretraining(GPT):
    """A GPT with random float32 weights, whose blocks compute in bfloat16."""

    def __init__(self, config):
        """As GPT-2 was: normal(0, 0.02), and smaller where a projection adds to the residual stream (section 2.3)."""
        super().__init__(config)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
            elif p.dim() == 2:
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                torch.nn.init.normal_(p, std=0.02 / scale)

    def loss(self, ids, targets, lengths):
        """The mean over all tokens that have a next one in their document."""
        low = {name: p.bfloat16() for name, p in self.named_parameters() if name.startswith(("h.", "ln_f."))}
        counted = np.flatnonzero(targets >= 0)  # (M,)
        ids, counted, targets = (torch.from_numpy(x.astype(np.int64)) for x in (ids, counted, targets[counted]))
        inputs = [to_device(x, self.device) for x in (ids, counted, targets)]
        return torch.func.functional_call(self, low, (*inputs, PackedBatch(lengths, device=self.device)))

    def forward(self, ids, counted, targets, packed):
        backend = "plain" if self.device.type == "cpu" else "auto"  # the faster one for short texts
        x = self.embed(ids, packed.position).bfloat16()
        x = self.blocks(x, lambda i, qkv: attend(qkv, self.config.n_head, packed, backend=backend))  # (N, n_embd)
        logits = x[counted] @ self.wte.weight.bfloat16().T  # (M, vocab_size)
        logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return -logp.gather(1, targets[:, None]).mean()


if __name__ == "__main__":
    main()
