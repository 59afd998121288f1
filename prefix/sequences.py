"""How a pair of texts becomes one sequence, for training and for decoding.

    open source                 open target
      |                           |
      v                           v
      source tokens               <sep>    target tokens   <|endoftext|>

      sees source bank            sees both banks
      no loss                     loss: each must predict the token after it

<sep> is the token of "\\n". Nothing here knows which languages there are. A pair is a tuple:

    (source ids, target ids, number of the source's bank, number of the target's bank)
"""

from dataclasses import dataclass

import torch

from minigpt.attention import PackedBatch, to_device
from minigpt.files import UserError


def separator(tokenizer):
    """The id of <sep>. Raises UserError where a vocabulary has no single token for a newline."""
    ids = tokenizer.encode("\n")
    if len(ids) != 1:
        raise UserError(f"this vocabulary spells a newline with {len(ids)} tokens; one is needed as the separator")
    return ids[0]


def pairs_of(corpus, examples):
    """Examples of a Corpus, (row, source column, target column) each -> pairs. Column i's bank has the number i."""
    return [(corpus.ids(row, s).tolist(), corpus.ids(row, t).tolist(), int(s), int(t)) for row, s, t in examples]


def n_tokens(pair):
    """How many tokens a pair takes: its two sides and the separator."""
    source, target, _, _ = pair
    return len(source) + 1 + len(target)


@dataclass
class MicroBatch:
    """Pairs that go through the model at once, packed one behind the other: N tokens, M of them with a loss."""

    ids: torch.Tensor  # (N,)
    packed: PackedBatch  # where each pair starts, and which banks each token sees
    target_index: torch.Tensor  # (M,): the tokens whose successor counts
    targets: torch.Tensor  # (M,): these successors


def pack_pairs(pairs, sep, eot, device="cpu"):
    """Pairs -> a MicroBatch on `device`. sep, eot: the ids of <sep> and <|endoftext|>."""
    ids, bank_mask, target_index, targets, lengths = [], [], [], [], []
    for source, target, source_bank, target_bank in pairs:
        first, n_targets = len(ids) + len(source), len(target) + 1  # <sep> stands at `first`, and predicts target[0]
        ids += [*source, sep, *target]
        bank_mask += [1 << source_bank] * len(source) + [1 << source_bank | 1 << target_bank] * n_targets
        target_index += range(first, first + n_targets)
        targets += [*target, eot]
        lengths.append(len(source) + n_targets)
    packed = PackedBatch(lengths, torch.tensor(bank_mask), device)
    ids, target_index, targets = (to_device(torch.tensor(x), packed.device) for x in (ids, target_index, targets))
    return MicroBatch(ids, packed, target_index, targets)
