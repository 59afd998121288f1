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
from prefix.data import clean


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


def prompt(tokenizer, banks, text, source, target, max_new=None, limit=None):
    """The Prompt that asks for the translation of `text`, or None where the context (`limit` positions) has no room for
    an answer. max_new: by default twice the source plus 16; cut to the room that there is."""
    sees_source, sees_both = banks.mask([source]), banks.mask([source, target])
    ids = tokenizer.encode(clean(text))  # as training read it: without a newline, which would be a separator
    opened = [sees_source] * len(ids) + [sees_both]
    ids = ids + [separator(tokenizer)]
    room = limit - banks.position_offset - len(ids)
    return Prompt(ids, min(max_new or 2 * len(ids) + 16, room), opened) if room > 0 else None


def translate(model, tokenizer, banks, texts, source, target, max_new=None, batch_size=32, sampler=None, beams=1, first=0):
    """List of texts -> list of (translation, finished), in the same order; an empty text gives an empty one.

    source, target: bank names. finished is False where a translation was cut at its limit; ("", False) is a text too
    long for the context to leave any room for an answer. first: the number of the first text, for sampling: text i
    draws from stream first + i."""
    prompts = {}  # by the number of their text
    for i, text in enumerate(texts):
        asked = clean(text) and prompt(tokenizer, banks, text, source, target, max_new, model.config.n_positions)
        if asked:
            prompts[i], asked.stream = asked, first + i
    slots, offset, waiting = banks.slots().to(model.dtype), banks.position_offset, list(prompts.values())
    if beams > 1:
        generated = beam_search(model, waiting, [tokenizer.eot], slots, offset, beams, batch_size)
    else:
        generated = generate(model, waiting, [tokenizer.eot], slots, offset, batch_size, sampler)
    results = [("", not clean(text)) for text in texts]
    for i, result in zip(prompts, generated):
        results[i] = (tokenizer.decode(result.ids), result.finished)
    return results
