"""Where slots start. Prefix-tuning learns little from a bad start (Li & Liang 2021, section 7.4).

text          keys and values that the model itself computes for real sentences of the bank's language (the default):
              TEXT_SLOTS of them, and any further slots as in zero-effect
random        normal noise, in units of the base's keys and values
zero-effect   values of zero and keys that next to no query looks at: the model begins unchanged
"""

import math
from itertools import chain, islice

import torch

from minigpt.backends import attend
from minigpt.files import UserError
from prefix.banks import Banks, compute_kv
from prefix.distributed import log
from prefix.reparam import Reparametrised, TrainableBanks
from prefix.sequences import n_tokens, pack_pairs, pairs_of, separator

INITS = ("text", "random", "zero-effect")
NOISE, QUIET_NOISE = 0.5, 0.15  # standard deviations of the noise of random and zero-effect, in units
# exp(QUIET_MARGIN): how many times more attention text gets than all slots together. A wider margin would change less, but
# learn more slowly: at 10, gradients sink below AdamW's epsilon.
QUIET_MARGIN = 6.0
QUERY_TOKENS = 8192  # that zero-effect reads
UNIT_TOKENS = 512  # that units are measured on
# Slots of text share the attention with the text that the base is to read: the more there are, the worse it starts
# (demo, loss 1.71 without slots: 2.9 with 10, 6.0 with 100), and the more of the training goes into mending that.
TEXT_SLOTS = 10


def initial_banks(config, model, tokenizer, corpus):
    """The TrainableBanks before the first step. config: of the run (run.py)."""
    units, offset = units_of(model, corpus), config["position_offset"]
    start = banks_by_init(config, model, tokenizer, corpus, units)
    banks = dict(zip(start.names, start.key_values()))
    if config.get("from_prefix"):
        there = Banks.load(config["from_prefix"], model)
        if not set(banks) & set(there.names):
            raise UserError(f"{config['from_prefix']} has no bank of {', '.join(banks)}, but {', '.join(there.names)}")
        if there.position_offset != offset:
            starts = f"position {there.position_offset}, in this run at {offset}"
            raise UserError(f"{config['from_prefix']}: its text starts at {starts} (--position-offset)")
        if lengths := sorted({n for name, n in zip(there.names, there.prefix_len) if name in banks} - {config["prefix_len"]}):
            log(f"Banks of {config['from_prefix']} keep their {', '.join(map(str, lengths))} slots")
        banks |= {name: pair for name, pair in zip(there.names, there.key_values()) if name in banks}
    start = Banks(banks, offset).to(model.device)
    if config.get("reparam"):
        return Reparametrised(start, units, config["settings"]["seed"]).to(model.device)
    return TrainableBanks(start, units, config.get("train_banks"))


def banks_by_init(config, model, tokenizer, corpus, units):
    """Banks as --init says."""
    names, prefix_len, seed = corpus.columns, config["prefix_len"], config["settings"]["seed"]
    if config["init"] == "random":
        return random_banks(model.config, names, prefix_len, seed, units)
    n_text = min(prefix_len, TEXT_SLOTS) if config["init"] == "text" else 0
    text = from_text(model, {name: first_tokens(corpus, i, TEXT_SLOTS) for i, name in enumerate(names)}, n_text)
    if n_text == prefix_len:
        return text
    noise = random_banks(model.config, names, prefix_len - n_text, seed, (units[0], 0.0), QUIET_NOISE)
    margin, pairs = QUIET_MARGIN + math.log(sum(noise.prefix_len)), first_pairs(model, tokenizer, corpus)
    quiet = quiet_keys(model, pairs, margin, units[0], config["position_offset"])  # (n_layer, n_head, 1, head_dim)
    banks = {}
    for name, (text_key, text_value), (key, value) in zip(names, text.key_values(), noise.key_values()):
        banks[name] = torch.cat([text_key, quiet + key], dim=2), torch.cat([text_value, value], dim=2)
    return Banks(banks)


def units_of(model, corpus):
    """The standard deviations, about their mean over tokens, of the keys and of the values that the base computes for
    training text -> two (n_layer, n_head, 1, 1). See TrainableBanks."""
    columns = range(len(corpus.columns))
    n = min(UNIT_TOKENS, model.config.n_positions) // len(columns)
    kv = compute_kv(model, [i for column in columns for i in first_tokens(corpus, column, n)])
    spread = [x - x.mean(dim=2, keepdim=True) for x in kv]  # (n_layer, n_head, T, head_dim)
    return [x.square().mean(dim=(2, 3), keepdim=True).sqrt() for x in spread]


def random_banks(config, names, prefix_len, seed=0, units=(1.0, 1.0), std=NOISE):
    """Normal keys and values with a standard deviation of `std` units. config: a GPTConfig."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.n_layer, config.n_head, prefix_len, config.head_dim)
    device = units[0].device if torch.is_tensor(units[0]) else "cpu"
    draw = lambda unit: std * unit * torch.randn(shape, generator=generator).to(device)
    return Banks({name: (draw(units[0]), draw(units[1])) for name in names})


def from_text(model, ids, prefix_len):
    """Keys and values of real tokens, tiled or cut to prefix_len. ids: {name: list of token ids}, at least one each."""
    banks = {}
    for name, tokens in ids.items():
        tiled = [i % len(tokens) for i in range(prefix_len)]
        banks[name] = [x[:, :, tiled] for x in compute_kv(model, tokens)]
    return Banks(banks)


@torch.no_grad()
def quiet_keys(model, batch, margin, unit, position_offset):
    """One quiet key for each layer and head -> (n_layer, n_head, 1, head_dim), float32. unit: (n_layer, n_head, 1, 1).

    A slot takes attention by exp(its score), the text by the sum of exp(score) over its tokens. The log of that sum less
    `margin` is a query's ceiling: a key is quiet if each query of `batch` scores it below its ceiling. smallest_below
    finds the shortest that nearly is; it counts in units: k = unit * x, so q . k = (unit * q) . x."""
    keys, n_head, packed = [], model.config.n_head, batch.packed
    future = torch.ones(packed.longest, packed.longest, dtype=torch.bool, device=batch.ids.device).triu(1)

    def attn_fn(i, qkv):
        q, k, _ = qkv.float().unflatten(-1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (n_head, N, head_dim)
        q, text = q / math.sqrt(q.size(-1)), []
        for one_q, one_k in zip(q.split(packed.lengths, 1), k.split(packed.lengths, 1)):  # each pair alone: all fill memory
            T = one_q.size(1)
            scores = (one_q @ one_k.transpose(-2, -1)).masked_fill(future[:T, :T], -torch.inf)  # (n_head, T, T)
            text.append(scores.logsumexp(dim=-1))
        keys.append(unit[i] * smallest_below(unit[i] * q, torch.cat(text, 1) - margin))
        return attend(qkv, n_head, packed, backend=model.attention)

    model.blocks(model.embed(batch.ids, packed.position + position_offset), attn_fn)
    return torch.stack(keys)


def smallest_below(q, ceiling, steps=20):
    """q (n_head, N, head_dim), ceiling (n_head, N) -> k (n_head, 1, head_dim), which minimises

        sum over queries of max(0, q . k - ceiling)^2 + |k|^2

    by Newton's method: least squares over the queries above their ceiling, again until they stay the same (Chapelle
    2007, section 2.3)."""
    missed = torch.ones_like(ceiling)
    eye = torch.eye(q.size(-1), device=q.device)
    for _ in range(steps):
        a = (q * missed[..., None]).transpose(-2, -1)  # (n_head, head_dim, N)
        k = torch.linalg.solve(a @ q + eye, a @ ceiling[..., None])  # (n_head, head_dim, 1)
        missed = ((q @ k)[..., 0] > ceiling).float()
    return k.transpose(-2, -1)


def first_pairs(model, tokenizer, corpus):
    """The first training pairs, in every direction, packed: QUERY_TOKENS tokens or a few more."""
    pairs, n = [], 0
    for example in corpus.examples("train"):
        pairs += pairs_of(corpus, [example])
        n += n_tokens(pairs[-1])
        if n >= QUERY_TOKENS:
            break
    return pack_pairs(pairs, separator(tokenizer), tokenizer.eot, model.device)


def first_tokens(corpus, column, n):
    """The first n tokens of a column's training sentences. Raises UserError where there are none."""
    texts = (corpus.ids(row, column).tolist() for row in corpus.rows("train"))
    ids = list(islice(chain.from_iterable(texts), n))
    if not ids:
        raise UserError(f"no training pair has a text in the column {corpus.columns[column]!r}: give more data")
    return ids
