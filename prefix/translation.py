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

from minigpt.attention import Layout
from minigpt.beam import beam_search
from minigpt.errors import UserError
from minigpt.generate import Prompt, generate
from prefix import distributed
from prefix.data import MAX_FIELD, clean


def separator(tokenizer):
    """The id of <sep>. Raises UserError where a vocabulary has no single token for a newline."""
    ids = tokenizer.encode("\n")
    if len(ids) != 1:
        raise UserError(f"this vocabulary spells a newline with {len(ids)} tokens; one is needed as the separator")
    return ids[0]


@dataclass
class Batch:
    """Packed sequences. ids: (N,); layout: their sentences and open banks; at: (M,) the tokens whose successor
    counts; targets: (M,) those successors."""

    ids: torch.Tensor
    layout: Layout
    at: torch.Tensor
    targets: torch.Tensor


def pack(examples, sep, eot, device="cpu"):
    """examples: (source ids, target ids, source bank, target bank) each -> Batch on `device`."""
    ids, opened, at, targets, lengths = [], [], [], [], []
    for source, target, source_bank, target_bank in examples:
        at.append(torch.arange(len(target) + 1) + sum(lengths) + len(source))
        source, target = (torch.as_tensor(side, dtype=torch.int64) for side in (source, target))  # either may be empty
        row = torch.cat([source, torch.tensor([sep]), target])
        ids.append(row)
        opened += [1 << source_bank] * len(source) + [1 << source_bank | 1 << target_bank] * (len(target) + 1)
        targets.append(torch.cat([row[len(source) + 1 :], torch.tensor([eot])]))
        lengths.append(len(row))
    layout = Layout(lengths, torch.tensor(opened), device)
    return Batch(*(torch.cat(x).to(device) if isinstance(x, list) else x for x in (ids, layout, at, targets)))


@dataclass
class Translation:
    """text: one line. finished: False where it was cut at its limit. fault: why there is none, or None."""

    text: str = ""
    finished: bool = True
    fault: str | None = None


def prompt(tokenizer, banks, text, source, target, limit, max_new=None):
    """The Prompt that asks for the translation of `text`. limit: the positions that the model's context has. max_new:
    by default twice the source plus 16. Raises UserError where there is no room to answer."""
    if len(text) > MAX_FIELD:  # tiktoken gives up on such texts, and not as an exception
        raise UserError(f"{len(text):,} characters are more than the {MAX_FIELD:,} that one sentence may have")
    ids = tokenizer.encode(clean(text))  # as training read it: without a newline, which would be a separator
    opened = [banks.mask([source])] * len(ids) + [banks.mask([source, target])]
    room = limit - banks.position_offset - len(opened)
    if room < 1:
        raise UserError(f"{len(ids)} tokens leave no room to answer in this model's context of {limit}")
    return Prompt([*ids, separator(tokenizer)], min(max_new or 2 * len(ids) + 16, room), opened)


def translate(model, tokenizer, banks, texts, source, target, max_new=None, batch_size=32, sampler=None, beams=1, first=0):
    """List of texts -> list of Translation, in the same order; an empty text gives an empty one.

    source, target: bank names. first: the number of the first text, for sampling: text i draws from stream first + i.
    Several processes share the texts out between them, and each returns all results."""
    results, prompts = [Translation() for _ in texts], {}
    for i, text in enumerate(texts):
        try:
            if clean(text):
                prompts[i] = prompt(tokenizer, banks, text, source, target, model.config.n_positions, max_new)
                prompts[i].stream = first + i
        except UserError as error:
            results[i] = Translation(finished=False, fault=str(error))
    mine = distributed.share(list(prompts.values()))
    slots, offset = banks.slots().to(model.dtype), banks.position_offset
    if beams > 1:
        generated = beam_search(model, mine, [tokenizer.eot], slots, offset, beams, batch_size)
    else:
        generated = generate(model, mine, [tokenizer.eot], slots, offset, batch_size, sampler)
    for i, result in zip(prompts, distributed.gather(generated)):
        results[i] = Translation(clean(tokenizer.decode(result.ids)), result.finished)
    return results
