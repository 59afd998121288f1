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

from minigpt import generate
from minigpt.attention import to_device
from minigpt.generate import Cache, Generated, Prompt


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
def beam_search(
    model, prompts, stop, slots=None, position_offset=0, beams=5, batch_size=32, length_penalty=1.0, on_finished=None
):
    """Prompts -> a list of Generated, in the same order: for each the hypothesis of the highest score.

    stop: ids that end a sentence. batch_size: seats, each for a sentence with all of its beams."""
    generate.check_prompts(model, prompts, position_offset)
    results, waiting = [Generated() for _ in prompts], generate.longest_first(prompts)
    seats = min(max(1, batch_size), len(waiting))
    cache = Cache(model, seats, max((len(p.ids) + p.max_new * beams for p in prompts), default=0))
    belongs = torch.zeros(seats, beams, cache.capacity, dtype=torch.bool, device=model.device)
    stop = set(stop)
    seated, numbers = [], []  # the Search of each seat, and its sentence's number

    def choose(logits, first):
        """logits (B, beams, vocab_size) of the seats from `first` on -> their new beams, or what they have found."""
        parents = to_device(torch.tensor(_choose(seated[first:], logits, stop, length_penalty)), model.device)
        rows = torch.arange(first, len(seated), device=model.device)[:, None]
        belongs[first : len(seated)] = belongs[rows, parents]
        for seat in reversed(range(first, len(seated))):
            if seated[seat].done:
                results[numbers[seat]] = Generated(*seated[seat].finished[0][1:])
                belongs[seat] = belongs[len(seated) - 1]
                generate.leave(cache, seat, seated, numbers)
                if on_finished:
                    on_finished()

    while waiting or seated:
        B = len(seated)
        if generate.time_to_seat(waiting, seated, seats):
            new, logits = generate.sit_down(model, cache, waiting, prompts, B, slots, position_offset)
            seated += [Search(prompts[n], [[]] * beams, [0.0] + [-torch.inf] * (beams - 1)) for n in new]
            numbers += new
            length = to_device(torch.tensor(cache.length[B : len(seated)]), model.device)[:, None, None]
            belongs[B : len(seated)] = torch.arange(cache.capacity, device=model.device) < length
            choose(logits[:, None].expand(-1, beams, -1), B)  # all beams are the same yet: one of them counts
        else:
            newest = [[tokens[-1] for tokens in search.beams] for search in seated]
            ids, position = to_device(torch.tensor([newest, [[s.position] * beams for s in seated]]), model.device)
            length = to_device(torch.tensor(cache.length[:B]), model.device)[:, None]
            entry = length + torch.arange(beams, device=model.device)  # (B, beams)
            belongs[:B].scatter_(2, entry[:, :, None], True)
            past = belongs[:B, :, : generate.reach(cache, B, beams)]
            bank_mask = generate.open_now([search.prompt for search in seated], slots)
            choose(generate.extend(model, cache, ids, position + position_offset, past, bank_mask, slots), 0)
    return results


def _choose(searches, logits, stop, length_penalty):
    """Give each sentence its new beams -> the beam that each of them goes on from: a list of beams for each."""
    scores = to_device(torch.tensor([search.scores for search in searches]), logits.device)  # (B, beams)
    logp = logits.float().log_softmax(dim=-1) + scores[:, :, None]
    likeliest = logp.flatten(1).topk((len(stop) + 1) * scores.size(1), dim=1)  # (B, 2 * beams) with one stop token
    best, offer = torch.stack([likeliest.values.double(), likeliest.indices.double()]).tolist()  # one wait, all exact
    advanced = []
    for search, best, offer in zip(searches, best, offer):
        parents, tokens = zip(*(divmod(int(i), logits.size(-1)) for i in offer))
        advanced.append(_advance(search, list(zip(best, parents, tokens)), stop, length_penalty))
    return advanced


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
