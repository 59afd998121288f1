"""Beam search over the same cache as generate.py: each sentence keeps its best `beams` beginnings.

At each step every beam of a sentence offers its next tokens; of all offers the 2 * beams likeliest are looked at.
An offer that ends the sentence is a finished hypothesis, scored sum(log p) / length ** length_penalty; the others
become the new beams. A sentence is done when no running beam can still beat its worst kept hypothesis.

All beams of a sentence share its seat in the cache. Nothing is copied when a beam goes on from another's beginning:
a table says which entries belong to which beam, and the table's rows change places.

    entries of a seat   prompt  | step 1 | step 2 |          beam 0 chose "the cat", beam 1 "the dog", beam 2 "a cat"
                        a b c d | the a _| cat dog cat
    beam 0              x x x x | x      | x
    beam 1              x x x x | x      |     x
    beam 2              x x x x |     x  |         x
"""

from dataclasses import dataclass, field

import torch

from minigpt.attention import upload
from minigpt.generate import Cache, Generated, Prompt, check_prompts, extend, longest_first, open_now, prefill, reach
from minigpt.generate import time_to_seat


@dataclass
class Search:
    """One sentence's beams: the tokens of each and their summed log-probabilities, and what has finished."""

    prompt: Prompt
    beams: list
    scores: list
    finished: list = field(default_factory=list)  # (score, tokens, ended by a stop token), best first
    done: bool = False

    @property
    def position(self):
        """That of the beams' newest tokens."""
        return len(self.prompt.ids) + len(self.beams[0]) - 1


@torch.no_grad()
def beam_search(model, prompts, stop, slots=None, position_offset=0, beams=5, batch_size=32, length_penalty=1.0):
    """Prompts -> a list of Generated, in the same order: for each the hypothesis of the highest score.

    stop: ids that end a sentence. batch_size: beams decoded at once, of one sentence at least."""
    check_prompts(model, prompts, position_offset)
    results, waiting = [Generated() for _ in prompts], longest_first(prompts)
    seats = min(max(1, batch_size // beams), len(waiting))
    cache = Cache(model, seats, max((len(p.ids) + p.max_new * beams for p in prompts), default=0))
    belongs = torch.zeros(seats, beams, cache.capacity, dtype=torch.bool, device=model.device)
    seated = []  # (number, Search) of each seat

    def choose(logits, first):
        """logits (B, beams, vocab_size) of the seats from `first` on -> their new beams, or what they have found."""
        parents = _choose([search for _, search in seated[first:]], logits, beams, set(stop), length_penalty)
        rows = torch.arange(first, len(seated), device=model.device)[:, None]
        belongs[first : len(seated)] = belongs[rows, torch.tensor(parents, device=model.device)]
        for seat in reversed(range(first, len(seated))):
            number, search = seated[seat]
            if search.done:
                results[number] = Generated(*search.finished[0][1:])
                _leave(cache, belongs, seated, seat)

    while waiting or seated:
        if time_to_seat(waiting, seated, seats):
            new = [waiting.popleft() for _ in range(min(len(waiting), seats - len(seated)))]
            first = len(seated)
            seated += [(n, Search(prompts[n], [[]] * beams, [0.0] + [-torch.inf] * (beams - 1))) for n in new]
            opened = None if slots is None else [prompts[n].opened for n in new]
            free, ids = list(range(first, len(seated))), [prompts[n].ids for n in new]
            logits = prefill(model, cache, free, ids, opened, slots, position_offset)  # (B, vocab_size)
            belongs[first : len(seated)] = torch.arange(cache.capacity) < torch.tensor(cache.length)[free, None, None]
            choose(logits[:, None].expand(-1, beams, -1), first)  # all beams are the same yet: one of them counts
        if seated:
            searches = [search for _, search in seated]
            ids = torch.tensor([[tokens[-1] for tokens in s.beams] for s in searches], device=model.device)
            position = torch.tensor([[s.position] * beams for s in searches], device=model.device) + position_offset
            beam = torch.arange(beams, device=model.device)
            entry = upload(torch.tensor(cache.length[: len(seated)]), model.device)[:, None] + beam  # (B, beams)
            belongs[: len(seated)].scatter_(2, entry[:, :, None], True)
            past = belongs[: len(seated), :, : reach(cache, len(seated), beams)]
            opened = open_now([s.prompt for s in searches], slots)
            choose(extend(model, cache, ids, position, past, opened, slots), 0)
    return results


def _choose(searches, logits, beams, stop, length_penalty):
    """Give each sentence its new beams -> the beam that each of them goes on from: a list of beams for each."""
    scores = torch.tensor([search.scores for search in searches], device=logits.device)  # (B, beams)
    logp = logits.float().log_softmax(dim=-1) + scores[:, :, None]
    best, offer = logp.flatten(1).topk((len(stop) + 1) * beams, dim=1)  # (B, 2 * beams) with one stop token
    parent, token = offer // logits.size(-1), offer % logits.size(-1)
    offers = [list(zip(*row)) for row in zip(best.tolist(), parent.tolist(), token.tolist())]
    return [_advance(search, row, stop, length_penalty) for search, row in zip(searches, offers)]


def _advance(search, offers, stop, length_penalty):
    """Sort a sentence's offers (score, parent beam, token), best first, into finished hypotheses and new beams."""
    old, going, beams = search.beams, [], len(search.beams)
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
    search.scores = [score for score, _, _ in going]
    search.finished = sorted(search.finished, key=lambda hypothesis: -hypothesis[0])[:beams]
    beaten = len(search.finished) == beams and search.scores[0] / length**length_penalty <= search.finished[-1][0]
    search.done = beaten or last
    return [parent for _, parent, _ in going]


def _leave(cache, belongs, seated, seat):
    """Fill a seat whose sentence is done with the last seat's sentence."""
    end = len(seated) - 1
    if seat != end:
        cache.move(end, seat)
        belongs[seat] = belongs[end]
    seated[seat] = seated[end]
    seated.pop()
