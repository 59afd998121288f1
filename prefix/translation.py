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


def translate(
    model, tokenizer, banks, texts, source, target, max_new=None, batch_size=32, sampler=None, beams=1, first=0
):
    """List of texts -> list of Translation, in the same order; an empty text gives an empty one.

    source, target: bank names. max_new: tokens of each answer, by default twice the source plus 16; never past the
    context. first: the number of the first text, for sampling: text i draws from stream first + i. Several processes
    share the texts out between them, and each returns all results."""
    sees_source, sees_both, sep = banks.mask([source]), banks.mask([source, target]), separator(tokenizer)
    room = model.config.n_positions - banks.position_offset
    slots, offset = banks.slots().to(model.dtype), banks.position_offset
    results, prompts = [Translation() for _ in texts], {}
    for i, text in enumerate(map(clean, texts)):  # as training read them: without a newline, which would be a separator
        if len(text) > MAX_FIELD:  # tiktoken gives up on such texts, and not as an exception
            results[i] = Translation(finished=False, fault=f"more than {MAX_FIELD:,} characters are no sentence")
        elif text:
            ids = tokenizer.encode(text)
            opened, left = [sees_source] * len(ids) + [sees_both], room - len(ids) - 1
            prompts[i] = Prompt([*ids, sep], min(max_new or 2 * len(ids) + 16, left), opened, first + i)

    def answer(prompts):
        if beams > 1:
            return beam_search(model, prompts, [tokenizer.eot], slots, offset, beams, batch_size)
        return generate(model, prompts, [tokenizer.eot], slots, offset, batch_size, sampler)

    return answered(results, prompts, answer, tokenizer)


def answered(results, prompts, answer, tokenizer):
    """Fill in `results` what answer() makes of the prompts, {number: Prompt}; each process answers its share. A prompt
    without room for a single new token is a fault."""
    for i in [i for i, prompt in prompts.items() if prompt.max_new < 1]:
        fault = f"{len(prompts.pop(i).ids)} tokens leave no room to answer in this model's context"
        results[i] = Translation(finished=False, fault=fault)
    generated = distributed.gather(answer(distributed.share(list(prompts.values()))))
    for i, result in zip(prompts, generated):
        results[i] = Translation(clean(tokenizer.decode(result.ids)), result.finished)
    return results
