"""Decoding where only some answers are allowed: score each of them, take the likeliest.

    log p(answer | text) = sum over its tokens, its end token among them, of log p(token | text, tokens before)

The answers run through the model packed side by side. This is exact. Taking the likeliest allowed token step by step is
not: it settles for a first token before it knows what the rest of the answer costs. The end token counts, so answers of
different lengths compare as they are.
"""

import torch

from minigpt.attention import PackedBatch, to_device
from minigpt.generate import Generated


def likeliest_answer(model, prompts, answers, slots=None, position_offset=0, batch_size=32):
    """Prompts -> a list of Generated, in the same order: the likeliest of the answers after each.

    answers: lists of ids, each with the token that ends it; of two that are as likely, the first wins. A prompt and
    the longest answer must fit into the context. batch_size: answers scored at once."""
    pairs, scores = [(prompt, answer) for prompt in prompts for answer in answers], []
    for i in range(0, len(pairs), batch_size):
        scores += log_p(model, pairs[i : i + batch_size], slots, position_offset).tolist()
    best = torch.tensor(scores).view(len(prompts), len(answers)).argmax(dim=1)
    return [Generated(answers[i][:-1], finished=True) for i in best.tolist()]


def max_new_tokens(answers, left):
    """The longest answer's length if it fits into `left` tokens (its last token is never fed in), else 0."""
    longest = max(map(len, answers))
    return longest if longest - 1 <= left else 0


@torch.no_grad()
def log_p(model, pairs, slots=None, position_offset=0):
    """(prompt, answer) each -> log p(answer | prompt) (B,), float32."""
    ids, bank_mask, at, targets = [], [], [], []
    for prompt, answer in pairs:
        at += range(len(ids) + len(prompt.ids) - 1, len(ids) + len(prompt.ids) + len(answer) - 1)
        ids += prompt.ids + answer[:-1]
        targets += answer
        if slots is not None:
            bank_mask += prompt.bank_mask + prompt.bank_mask[-1:] * (len(answer) - 1)
    lengths = [len(prompt.ids) + len(answer) - 1 for prompt, answer in pairs]
    packed = PackedBatch(lengths, None if slots is None else torch.tensor(bank_mask), model.device)
    ids, at, targets = (to_device(torch.tensor(x), model.device) for x in (ids, at, targets))
    hidden = model.hidden(ids, packed, slots, position_offset)  # (N, n_embd)
    logp = model.logits(hidden[at]).float().log_softmax(dim=-1)  # (M, vocab_size), M = all tokens of all answers
    of_targets = logp.gather(1, targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in of_targets.split([len(answer) for _, answer in pairs])])
