"""What bounds the training of slots on a frozen GPT-2, and how near that bound we and transformers + peft come.

A token must pass forward through every weight of the blocks, 2 FLOPs each (a product and a sum), and the gradient must
pass back through every weight, 2 more, to reach the slots of the layers below. Ordinary training spends 2 more on
the gradient of the weights: freezing saves that, and no other FLOPs. So a step cannot take less time than the FLOPs
it needs, over those per second of the machine's own matrix products (the ceiling, measured at the start). They are,
with d = n_embd, for a sentence of n tokens of which t predict a target:

    blocks      4 n n_layer (4 d^2 + 2 d mlp_dim) - 2 n 3 d^2     below the first c_attn nothing wants a gradient
    head        4 t vocab_size d                                  tokens that predict no target need no logits
    attention   (4 + 10) d for each token, layer, and key seen    q.k, p.v; q.k again, and the gradients of p, q, k, v;
                                                                  in the first layer those of the slots alone: 4 + 8

"share" is that time over the time taken. Each rung of the ladder takes away work, or waiting, that is not in the count:

    peft, naive         sentences padded to the longest of their micro-batch: products of nothing; and logits of all
                        tokens, in several float32 copies of 50,257 columns, though the head, in `gpt2` nearly a third
                        of the weights, is of use at the targets alone
    + packing           sentences one after another in a single row: no padding, but inside attention
    + target-only loss  logits of target tokens, a chunk at a time, the gradient of each chunk finished at once
    + fused attention   scores never reach memory (a GPU also loses the padding); micro-batches are cut by tokens
    + bf16              half the bytes, and a higher ceiling, where a CPU multiplies bfloat16 (on a GPU all rows do)
    + torch.compile     norms, GELU, biases and sums between the products: fewer trips to memory
    + checkpointing     the opposite trade: a third more FLOPs (not in the count), and only each block's input is kept

A rung has all that is above it; checkpointing goes without torch.compile. All rows train on the same pairs from the
same weights, so the losses of our rows agree. peft knows one prefix, open from the first token on, so it gets the slots
of both banks; it tries SDPA and eager attention and runs with the faster. Ratios are to peft in the same dtype. It has
no row with checkpointing, which it refuses in prefix tuning.

    python tests/benchmarks/train.py                            the ladder; 2 CPU cores: 2 steps a row, about 8 minutes
    python tests/benchmarks/train.py --shape gpt2-xl            ... on a GPU: 10 steps a row
    python tests/benchmarks/train.py --what attention           attention alone, against SDPA and FlexAttention
    python tests/benchmarks/train.py --what curve               what longer prefixes and longer sentences cost
"""

import argparse
import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import (
    Peak,
    ceiling,
    circumstances,
    clock,
    first_line,
    fresh,
    make_checkpoint,
    measure_row,
    multiplies_bf16,
    run_rows,
    timings,
)

from minigpt import GPT, GPTConfig, Tokenizer, checkpoint
from minigpt.attention import PackedBatch, Slots
from minigpt.backends import attend
from minigpt.config import PUBLISHED
from minigpt.loss import nll_sum
from prefix.batches import MICRO_BATCH_TOKENS, BatchLoader
from prefix.data import corpus as data
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS
from prefix.sequences import n_tokens, pack_pairs, separator
from prefix.trainer import Settings, Trainer

SHAPES = {"demo": GPTConfig.from_file(checkpoint.DEMO / "config.json"), **PUBLISHED}
REAL_DATA, REAL_VOCABULARY = ROOT.parent / "shared/data/en-fr.csv", ROOT.parent / "shared/data/gpt2_tokenizer"
ROWS_READ = 5000  # of the data file
IGNORED = -100  # the target of a token that predicts none, as cross_entropy and transformers have it
LENGTHS, SLOTS, PREFIX_LENS = (16, 64, 256, 1024), (0, 20, 200), (1, 10, 100, 1000)
TOKENS = {"cpu": 1024, "cuda": 16384}  # in a batch of --what attention and curve


def main():
    args = parse_arguments()
    if args.row:
        measures = {name: measure for rows, _ in PARTS.values() for name, measure in rows(args).items()}
        return measure_row(measures.get(args.row, measure_ceiling), args)
    vocabulary = REAL_VOCABULARY if args.shape != "demo" and REAL_VOCABULARY.is_dir() else checkpoint.DEMO
    result = {"circumstances": circumstances(args.device), "shape": args.shape, "data": args.data.name}
    result["steps"] = args.steps
    with tempfile.TemporaryDirectory() as home:
        make_checkpoint(SHAPES[args.shape], vocabulary, home)
        rates = result["ceiling"] = fresh("ceiling", home)
        if "error" in rates:
            sys.exit(f"no matrix product could be measured: {rates['error']}")
        print(f"{args.shape} on {result['circumstances']['device']}, {torch.get_num_threads()} CPU threads; "
              f"{args.data.name} in the vocabulary of {vocabulary.name}")  # fmt: skip
        for dtype, rate in rates.items():
            square, mlp = rate["square"] / 1e9, rate["mlp"] / 1e9
            print(f"{dtype} products: {square:,.0f} GFLOP/s, {mlp:,.0f} in the MLP's shape; the better is the ceiling")
        for what in args.what:
            rows, show = PARTS[what]
            result[what] = run_rows([name for name in rows(args) if args.only in name], home)
            show(result[what], rates)
    print(json.dumps(result))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure the speed and memory of training slots.")
    parser.add_argument("--what", nargs="+", choices=[*PARTS], default=["ladder"])
    parser.add_argument("--shape", choices=[*SHAPES], default="gpt2", help="of the model; its weights are random")
    parser.add_argument("--prefix-len", type=int, default=10, help="slots in each of two banks (10)")
    parser.add_argument("--data", type=Path, default=REAL_DATA if REAL_DATA.exists() else DEMO_CORPUS)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of an optimizer step (64)")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="sentences at a time: peft tries all of these, and "
                        "the first rungs take the first (CPU: 16, GPU: 64 16)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="measured in each row (CPU: 2, GPU: 10)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this text in their names")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how this script calls itself: one row, in its own process
    parser.add_argument("--home", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.steps, args.warmup = args.steps or (10 if cuda else 2), 3 if cuda else 1
    args.micro_batch = args.micro_batch or ([64, 16] if cuda else [16])
    return args


def dtypes(args):
    """The dtype to compute in, and the one that is a rung of its own, if there is one."""
    return ["bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"] if multiplies_bf16() else ["float32"]


def measure_ceiling(args):
    config = SHAPES[args.shape]
    return ceiling(args.device, dtypes(args), (MICRO_BATCH_TOKENS[args.device], config.n_embd, config.mlp_dim))


# The ladder: one optimizer step on the same pairs, in ever better ways


class Given(BatchLoader):
    """The pairs that every row gets, cut as in our own training."""

    def step(self, step):
        return self.batch_of(rows_of(self.args, self.corpus, step))


class Counted(Given):
    """Micro-batches of so many sentences, however long."""

    def cut(self, batch):
        size, batch.micro_batch_tokens = self.args.micro_batch[0], self.micro_batch_tokens
        groups = [batch.pairs[i : i + size] for i in range(0, len(batch.pairs), size)]
        batch.micro_batches = [pack_pairs(group, self.sep, self.eot, self.device) for group in groups]


class AllTargets(Counted):
    """A target for every token, most of which the loss passes over."""

    def cut(self, batch):
        super().cut(batch)
        for micro_batch in batch.micro_batches:
            targets = torch.full_like(micro_batch.ids, IGNORED)
            targets[micro_batch.target_index] = micro_batch.targets
            micro_batch.targets, micro_batch.target_index = targets, None


class Padded(AllTargets):
    """Sentences as long as the longest. (pad fills up with the first token, a source token without a target.)"""

    def cut(self, batch):
        super().cut(batch)
        for micro_batch in batch.micro_batches:
            ids, packed, targets = micro_batch.ids, micro_batch.packed, micro_batch.targets
            ids, bank_mask, micro_batch.targets = (packed.pad(x).flatten() for x in (ids, packed.bank_mask, targets))
            lengths = [packed.longest] * len(packed.lengths)
            micro_batch.ids, micro_batch.packed = ids, PackedBatch(lengths, bank_mask, packed.device)


class AllLogits(Trainer):
    """The logits of all tokens."""

    def loss(self, batch, slots):
        logits = self.model.logits(self.model.hidden(batch.ids, batch.packed, slots))
        return F.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED, reduction="sum")


def ladder(args):
    """{name of a row: how to measure it}."""
    first, last = dtypes(args)[0], dtypes(args)[-1]
    rows = {
        "peft": partial(train_peft, dtype=first),
        "naive": partial(train_ours, kind=Padded, attention="plain", dtype=first),
        "+ packing": partial(train_ours, kind=AllTargets, attention="plain", dtype=first),
        "+ target-only loss": partial(train_ours, kind=Counted, attention="plain", dtype=first),
        "+ fused attention": partial(train_ours, dtype=first),
    }
    if last != first:
        rows |= {"peft, bf16": partial(train_peft, dtype=last), "+ bf16": partial(train_ours, dtype=last)}
    rows["+ torch.compile"] = partial(train_ours, dtype=last, compiled=True)
    rows["+ checkpointing"] = partial(train_ours, dtype=last, checkpointing=True)
    return rows


def train_ours(args, dtype, kind=Given, attention="auto", compiled=False, checkpointing=False):
    corpus, peak = load_corpus(args), Peak(args.device)
    model = GPT.from_pretrained(args.home, args.device, getattr(torch, dtype))
    model.attention, model.checkpoint_activations = attention, checkpointing
    if compiled:
        compile_blocks(model)
    banks = random_banks(model.config, corpus.columns, args.prefix_len).to(args.device)
    settings = Settings(steps=args.warmup + args.steps, lr=0.001)
    tokenizer = Tokenizer.from_pretrained(args.home)
    loader = kind(corpus, tokenizer, settings, model.device)
    loader.args = args
    trainer = (AllLogits if issubclass(kind, AllTargets) else Trainer)(model, banks, loader, settings, args.home)
    batches = loader.steps(0, settings.steps)
    return measure_steps(args, dtype, peak, corpus, lambda step: trainer.optimizer_step(next(batches))["loss"])


def compile_blocks(model):
    """All of a block but attention, which takes lengths that are new in every batch."""
    for block in model.h:
        block.compile(dynamic=True)
    model.blocks = lambda x, attn_fn: GPT.blocks(model, x, torch.compiler.disable(attn_fn))


def train_peft(args, dtype):
    """As its users do, and well: frozen weights in `dtype`, no dropout, sentences sorted by length, batches ready
    before the clock runs, and of the ways to compute attention and to cut a batch the one that proves fastest."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    corpus, peak = load_corpus(args), Peak(args.device)
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    base = AutoModelForCausalLM.from_pretrained(args.home, dtype=getattr(torch, dtype), **no_dropout).to(args.device)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2 * args.prefix_len)
    model = get_peft_model(base, config).to(args.device).train()
    slots = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(slots, lr=0.001, weight_decay=0.0)

    def train(batches):
        total = sum((batch["labels"] != IGNORED).sum() for batch in batches)
        losses = []
        for batch in batches:
            losses.append(model(**batch, num_items_in_batch=total).loss)
            losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(slots, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sum(loss.detach() for loss in losses))

    tried = []
    for attention, micro in itertools.product(("sdpa", "eager"), args.micro_batch):
        base.set_attn_implementation(attention)
        batches = padded_batches(args, corpus, 0, micro)
        train(batches)
        _, seconds = clock(lambda: train(batches), args.device)
        tried.append({"attention": attention, "micro_batch": micro, "seconds": seconds})
    best = min(tried, key=lambda trial: trial["seconds"])
    base.set_attn_implementation(best["attention"])
    steps = [padded_batches(args, corpus, step, best["micro_batch"]) for step in range(args.warmup + args.steps)]
    return measure_steps(args, dtype, peak, corpus, lambda step: train(steps[step])) | {"tried": tried, "best": best}


def padded_batches(args, corpus, step, micro):
    """Micro-batches as transformers takes them: each row one pair and <|endoftext|>, padded on the right."""
    tokenizer, batches = Tokenizer.from_pretrained(args.home), []
    for group in groups(examples_of(args, corpus, step), micro):
        size = len(group), max(map(n_tokens, group)) + 1
        ids, labels = torch.full(size, tokenizer.eot), torch.full(size, IGNORED)
        mask = torch.zeros_like(ids)
        for i, (source, target, *_) in enumerate(group):
            row = torch.tensor([*source, separator(tokenizer), *target, tokenizer.eot])
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            labels[i, len(source) + 1 : len(row)] = row[len(source) + 1 :]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append({name: tensor.to(args.device) for name, tensor in batch.items()})
    return batches


def load_corpus(args):
    """The pairs. peft's slots take positions from the text: what is too long for it is left out for all."""
    tokenizer, context = Tokenizer.from_pretrained(args.home), SHAPES[args.shape].n_positions
    longest = min(384, context - 2 * args.prefix_len - 1)
    return data.load([args.data], None, tokenizer, ROWS_READ, longest, args.home)


def rows_of(args, corpus, step):
    """The pairs of a step, the same for every row. To warm up a CPU, an eighth of them."""
    pool = corpus.examples("train")
    size = max(2, args.batch_size // 8) if step < args.warmup and args.device == "cpu" else args.batch_size
    return pool[np.random.default_rng(step).permutation(len(pool))[:size]]


def examples_of(args, corpus, step):
    return [(corpus.ids(row, s), corpus.ids(row, t), int(s), int(t)) for row, s, t in rows_of(args, corpus, step)]


def groups(examples, size):
    """Micro-batches of `size` sentences of like length."""
    examples = sorted(examples, key=n_tokens)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def measure_steps(args, dtype, peak, corpus, train):
    """train(step) -> loss, timed after the warm-up. Rates are medians over the steps."""
    peak.reset()  # loading is over
    seconds, tokens, flops = [], [], []
    for step in range(args.warmup + args.steps):
        loss, taken = clock(lambda: train(step), args.device)
        seconds.append(taken)
        examples = examples_of(args, corpus, step)
        tokens.append(sum(map(n_tokens, examples)))
        flops.append(needed_flops(SHAPES[args.shape], examples, args.prefix_len))
    rate = lambda amounts: median([amount / s for amount, s in zip(amounts, seconds)][args.warmup :])
    return {
        "dtype": dtype,
        "tokens_per_second": rate(tokens),
        "seconds_per_step": median(seconds[args.warmup :]),
        "needed_flops_per_second": rate(flops),
        "peak_bytes": peak.bytes(),
        "loss": loss,
        "tokens": tokens[args.warmup :],
        "seconds": seconds,
    }


def needed_flops(config, examples, prefix_len):
    """As the docstring counts. Tokens before the separator see one bank, it and those after it two."""
    d, layers = config.n_embd, config.n_layer
    weights, flops = layers * (4 * d * d + 2 * d * config.mlp_dim), 0
    for source, target, *_ in examples:
        n, t = len(source) + 1 + len(target), len(target) + 1
        text, slots = n * (n + 1) // 2, prefix_len * (n + t)  # pairs of a token and a key that it sees
        flops += 4 * n * weights - 2 * n * 3 * d * d + 4 * t * config.vocab_size * d
        flops += layers * 4 * d * (text + slots) + (layers - 1) * 10 * d * (text + slots) + 8 * d * slots
    return flops


def show_ladder(rows, rates):
    print(f"\n{'':32}{'':9} tokens/s  of peft   s/step  peak GB  of peft   share     loss")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:32}{row['error']}")
            continue
        name += " ({attention}, {micro_batch} at a time)".format(**row["best"]) if "best" in row else ""
        peft = [other for key, other in rows.items() if key[:4] == "peft" and other.get("dtype") == row["dtype"]]
        speed, memory = (row[key] / peft[0][key] if peft else None for key in ("tokens_per_second", "peak_bytes"))
        share = row["needed_flops_per_second"] / max(rates[row["dtype"]].values())
        row |= {"speed_over_peft": speed, "memory_over_peft": memory, "share_of_ceiling": share}
        print(
            f"{name:32}{row['dtype']:9}{row['tokens_per_second']:9,.0f} {speed or 0:7.2f}x "
            f"{row['seconds_per_step']:8.2f} {row['peak_bytes'] / 1e9:8.2f} {memory or 0:7.2f}x "
            f"{share:7.1%} {row['loss']:8.4f}"
        )


# Attention alone, forward and backward


def attention(args):
    names = {"ours, fused": partial(ours, "fused"), "ours, plain": partial(ours, "plain")}
    names |= {"SDPA, padded": padded_sdpa, "FlexAttention": flex}
    return {name: partial(measure_attention, system=system) for name, system in names.items()}


def measure_attention(args, system):
    """Every length and number of slots: sentences of half that length to all of it, one layer of the shape."""
    cells = []
    for length in LENGTHS:
        count = TOKENS[args.device] // length
        lengths = [length, *np.random.default_rng(0).integers(length // 2, length + 1, count - 1).tolist()]
        for n_slots in SLOTS:
            cell = {"length": length, "slots": n_slots}
            try:
                peak = Peak(args.device)
                run = system(args, lengths, n_slots)
                peak.reset()  # what was needed to prepare, once for all layers, does not count
                rate = sum(lengths) / median(timings(run, args.device))
                cell |= {"tokens_per_second": rate, "peak_bytes": peak.bytes()}
            except Exception as error:
                cell["error"] = first_line(error)
            cells.append(cell)
    return {"dtype": dtypes(args)[0], "cells": cells}


def leaves(args, tokens, n_slots):
    """qkv (*tokens, 3C), slot keys and values (n_head, S, head_dim) in float32, and a function that takes the gradients
    of all three from attention's output."""
    config, dtype = SHAPES[args.shape], getattr(torch, dtypes(args)[0])
    draw = partial(torch.randn, device=args.device, requires_grad=True)
    inputs = [draw(*tokens, 3 * config.n_embd, dtype=dtype)]
    inputs += [draw(config.n_head, n_slots, config.head_dim) for _ in range(2)] if n_slots else [None, None]

    def differentiate(out):
        return torch.autograd.grad(out, [x for x in inputs if x is not None], torch.ones_like(out))

    return *inputs, differentiate


def ours(how, args, lengths, n_slots):
    qkv, key, value, differentiate = leaves(args, [sum(lengths)], n_slots)
    packed = PackedBatch(lengths, torch.ones(sum(lengths)), args.device)
    slots = Slots(key, value, torch.zeros(n_slots, dtype=torch.int32, device=args.device)) if n_slots else None
    return lambda: differentiate(attend(qkv, SHAPES[args.shape].n_head, packed, slots, how))


def with_slots(qkv, n_head, key, value):
    """qkv (B, T, 3C) -> q, k, v, each (B, n_head, T, head_dim), k and v with the slots in front."""
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    if key is not None:
        k, v = (torch.cat([s.to(x.dtype).expand(len(x), -1, -1, -1), x], dim=2) for s, x in ((key, k), (value, v)))
    return q, k, v


def padded_sdpa(args, lengths, n_slots):
    """torch's fused attention on padded rows, the mask written out: (B, 1, T, S + T), made once for all layers."""
    B, T, n_head = len(lengths), max(lengths), SHAPES[args.shape].n_head
    qkv, key, value, differentiate = leaves(args, [B, T], n_slots)
    real = torch.arange(T)[None] < torch.tensor(lengths)[:, None]  # (B, T)
    text = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None]  # (B, T, T)
    mask = torch.cat([torch.ones(B, T, n_slots, dtype=torch.bool), text], dim=-1)[:, None].to(args.device)
    compute = partial(F.scaled_dot_product_attention, attn_mask=mask)
    return lambda: differentiate(compute(*with_slots(qkv, n_head, key, value)))


def flex(args, lengths, n_slots):
    """FlexAttention on the packed row: a token sees the slots, and the tokens of its own sentence up to itself."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # or the ninth shape is not compiled any more
    N, n_head = sum(lengths), SHAPES[args.shape].n_head
    qkv, key, value, differentiate = leaves(args, [1, N], n_slots)
    start = PackedBatch(lengths, device=args.device).start

    def sees(b, h, q, k):
        return (k < n_slots) | ((k - n_slots <= q) & (k - n_slots >= start[q]))

    mask = create_block_mask(sees, None, None, N, n_slots + N, device=args.device)  # made once for all layers
    compute = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    return lambda: differentiate(compute(*with_slots(qkv, n_head, key, value)))


def show_attention(rows, _):
    print("\nAttention, forward and backward: tokens/s")
    print(f"{'length':>8}{'slots':>7}" + "".join(f"{name:>16}" for name in rows))
    grids = [row.get("cells") or itertools.repeat(row) for row in rows.values()]  # a row that failed: its error, always
    for (length, n_slots), *cells in zip(itertools.product(LENGTHS, SLOTS), *grids):
        rates = (f"{cell['tokens_per_second']:16,.0f}" if "error" not in cell else f"{'*':>16}" for cell in cells)
        print(f"{length:8}{n_slots:7}" + "".join(rates))
    for name, row in rows.items():
        for error in {cell["error"] for cell in row.get("cells", [row]) if "error" in cell}:
            print(f"* {name}: {error}")


# The curve: longer prefixes, longer sentences


def curve(args):
    return {"curve": measure_curve}


def measure_curve(args):
    """One bank, open everywhere; sentences of equal length, of which the second half are targets."""
    dtype, context = dtypes(args)[0], SHAPES[args.shape].n_positions
    model = GPT.from_pretrained(args.home, args.device, getattr(torch, dtype))
    points = [(prefix_len, 64) for prefix_len in PREFIX_LENS] + [(10, n) for n in LENGTHS if n <= context]
    cells = []
    for prefix_len, length in points:
        peak, tokens = Peak(args.device), TOKENS[args.device] // length * length
        rate = tokens / median(timings(curve_step(args, model, prefix_len, length), args.device))
        cell = {"prefix_len": prefix_len, "length": length, "tokens_per_second": rate, "peak_bytes": peak.bytes()}
        cells.append(cell)
    return {"dtype": dtype, "cells": cells}


def curve_step(args, model, prefix_len, length):
    banks = random_banks(model.config, ["only"], prefix_len).to(args.device)
    optimizer = torch.optim.AdamW(banks.parameters(), lr=0.001)
    lengths = [length] * (TOKENS[args.device] // length)
    packed = PackedBatch(lengths, torch.ones(sum(lengths)), args.device)
    at = (packed.position >= length // 2).nonzero()[:, 0]
    ids = torch.randint(model.config.vocab_size, (sum(lengths),), device=args.device)

    def step():
        hidden = model.hidden(ids, packed, banks.slots())
        nll_sum(hidden[at], model.wte.weight, ids[at]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def show_curve(rows, _):
    for row in rows.values():
        print("\n" + row.get("error", f"{'prefix_len':>11}{'length':>8}  tokens/s  peak GB (beside the model)"))
        for cell in row.get("cells", []):
            rate, peak = cell["tokens_per_second"], cell["peak_bytes"] / 1e9
            print(f"{cell['prefix_len']:11}{cell['length']:8}{rate:10,.0f}{peak:9.2f}")


PARTS = {"ladder": (ladder, show_ladder), "attention": (attention, show_attention), "curve": (curve, show_curve)}


if __name__ == "__main__":
    main()
