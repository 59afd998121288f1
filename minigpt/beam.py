"""Beam search over the same cache as generate.py: each sentence keeps its best `beams` beginnings.

At each step every beam of a sentence offers its next tokens; of all offers the 2 * beams likeliest are looked at.
An offer that ends the sentence is a finished hypothesis, scored sum(log p) / length ** length_penalty; the others
become the new beams. A sentence is done when no running beam can still beat its worst kept hypothesis.
"""

from dataclasses import dataclass, field

import torch

from minigpt.generate import Cache, Generated, Prompt, check_prompts, decode, prefill


@dataclass
class Search:
    """One sentence's beams: the tokens of each, and what has finished."""

    prompt: Prompt
    beams: list
    finished: list = field(default_factory=list)  # (score, tokens, ended by a stop token), best first
    done: bool = False


@torch.no_grad()
def beam_search(model, prompts, stop, slots=None, position_offset=0, beams=5, batch_size=32, length_penalty=1.0):
    """Prompts -> a list of Generated, in the same order: for each the hypothesis of the highest score.

    stop: ids that end a sentence. batch_size: seats, `beams` of them for each sentence."""
    check_prompts(model, prompts, position_offset)
    results = [Generated() for _ in prompts]
    numbers = [n for n, prompt in enumerate(prompts) if prompt.max_new > 0]
    at_once = max(1, batch_size // beams)
    for i in range(0, len(numbers), at_once):
        group = numbers[i : i + at_once]
        found = _search(model, [prompts[n] for n in group], set(stop), slots, position_offset, beams, length_penalty)
        for n, generated in zip(group, found):
            results[n] = generated
    return results


def _search(model, prompts, stop, slots, position_offset, beams, length_penalty):
    searches = [Search(prompt, [[] for _ in range(beams)]) for prompt in prompts]
    running = searches  # their beams take seats 0 .. len(running) * beams - 1
    cache = Cache(model, len(prompts) * beams, max(len(p.ids) + p.max_new for p in prompts))
    first_seats = list(range(0, len(prompts) * beams, beams))
    opened = None if slots is None else [p.opened for p in prompts]
    logits = prefill(model, cache, first_seats, [p.ids for p in prompts], opened, slots, position_offset)
    _reorder(cache, [seat for seat in first_seats for _ in range(beams)])
    logits = logits.repeat_interleave(beams, dim=0)  # (B * beams, vocab_size)
    scores = torch.full((len(prompts), beams), -torch.inf, device=model.device)
    scores[:, 0] = 0.0  # all beams are the same at first: let one of them speak
    while True:
        logp = logits.float().log_softmax(dim=-1).view(*scores.shape, -1) + scores[:, :, None]
        best, offer = logp.flatten(1).topk((len(stop) + 1) * beams, dim=1)  # (B, 2 * beams) with one stop token
        parent, token = offer // logits.size(-1), offer % logits.size(-1)
        offers = [list(zip(*row)) for row in zip(best.tolist(), parent.tolist(), token.tolist())]
        chosen = [_advance(search, row, beams, stop, length_penalty) for search, row in zip(running, offers)]
        going = [i for i, search in enumerate(running) if not search.done]
        if not going:
            return [_best(search) for search in searches]
        _reorder(cache, [i * beams + parent for i in going for _, parent, _ in chosen[i]])
        scores = torch.tensor([[score for score, _, _ in chosen[i]] for i in going], device=model.device)
        ids = torch.tensor([token for i in going for _, _, token in chosen[i]], device=model.device)
        running = [running[i] for i in going]
        masks = None
        if slots is not None:
            masks = torch.tensor([s.prompt.opened[-1] for s in running], device=model.device).repeat_interleave(beams)
        logits = decode(model, cache, ids, masks, slots, position_offset)


def _advance(search, offers, beams, stop, length_penalty):
    """Sort one sentence's offers (score, parent beam, token), best first, into finished hypotheses and new beams."""
    old, going = search.beams, []
    length = len(old[0]) + 1  # of a hypothesis that ends now, its stop token included
    last = length == search.prompt.max_new
    for rank, (score, parent, token) in enumerate(offers):
        stops = token in stop
        if (stops or last) and rank < beams:
            tokens = old[parent] if stops else old[parent] + [token]
            search.finished.append((score / length**length_penalty, tokens, stops))
        if not stops and len(going) < beams:
            going.append((score, parent, token))
    search.beams = [old[parent] + [token] for _, parent, token in going]
    search.finished = sorted(search.finished, key=lambda hypothesis: -hypothesis[0])[:beams]
    beaten = len(search.finished) == beams and going[0][0] / length**length_penalty <= search.finished[-1][0]
    search.done = beaten or last
    return going


def _best(search):
    _, tokens, ended = search.finished[0]
    return Generated(tokens, ended)


def _reorder(cache, parents):
    """Seat i goes on from what seat parents[i] holds, for the first len(parents) seats."""
    n, B = max(cache.length), len(parents)
    cache.key[:, :B, :, :n] = cache.key[:, parents, :, :n]
    cache.value[:, :B, :, :n] = cache.value[:, parents, :, :n]
    cache.length = [cache.length[parent] for parent in parents]
