"""How a pair of sentences becomes one sequence, for training and for decoding.

    open source                 open target
      |                           |
      v                           v
      source tokens               <sep>    target tokens   <|endoftext|>

      sees source bank            sees both banks
      no loss                     the token after each of these counts

<sep> is the token of "\\n". Nothing here knows which languages there are: a direction is a pair of bank numbers.
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


@dataclass
class TrainingBatch:
    """Packed sequences. ids: (N,); packed: where each starts and which banks each token sees; target_index: (M,) tokens
    whose successor counts; targets: (M,) these successors."""

    ids: torch.Tensor
    packed: PackedBatch
    target_index: torch.Tensor
    targets: torch.Tensor


def pack_pairs(examples, sep, eot, device="cpu"):
    """examples: (source ids, target ids, source bank, target bank) each -> TrainingBatch on `device`."""
    ids, bank_mask, target_index, targets, lengths = [], [], [], [], []
    for source, target, source_bank, target_bank in examples:
        target_index.append(torch.arange(len(target) + 1) + sum(lengths) + len(source))
        source, target = (torch.as_tensor(side, dtype=torch.int64) for side in (source, target))  # either may be empty
        row = torch.cat([source, torch.tensor([sep]), target])
        ids.append(row)
        bank_mask += [1 << source_bank] * len(source) + [1 << source_bank | 1 << target_bank] * (len(target) + 1)
        targets.append(torch.cat([row[len(source) + 1 :], torch.tensor([eot])]))
        lengths.append(len(row))
    packed = PackedBatch(lengths, torch.tensor(bank_mask), device)
    ids, target_index, targets = (to_device(torch.cat(parts), packed.device) for parts in (ids, target_index, targets))
    return TrainingBatch(ids, packed, target_index, targets)


def n_tokens(example):
    """How many real tokens an example takes: its two sides and the separator."""
    source, target, _, _ = example
    return len(source) + 1 + len(target)
