"""Beam search over the cache of cache.py: each sequence keeps its best `beams` hypotheses.

At each step every hypothesis proposes its next tokens. Of all candidates of a sequence so many are looked at that `beams`
of them do not end it: (stop tokens + 1) * beams. One that ends the sequence is finished, with the score
sum(log p) / length ** length_penalty; the others become the new beams. The search stops when the best running beam, scored
at its present length, is not above the worst finished one that is kept. (A heuristic: a longer one could still win.)

All beams of a sequence share its row of the cache, and nothing is copied when a beam continues another's tokens: a
table says which entries belong to which beam, and the rows of the table change places.

    entries of a row    prompt  | step 1 | step 2 |          a step adds one entry per beam; _ is one that no beam kept;
                        a b c d | the a _| cat dog cat       x: an entry that the beam sees
    beam 0              x x x x | x      | x
    beam 1              x x x x | x      |     x
    beam 2              x x x x |     x  |         x
"""

from dataclasses import dataclass, field

import torch

from minigpt import generate
from minigpt.attention import to_device
from minigpt.cache import borrow_cache, decode_one_token
from minigpt.generate import Generated, Prompt


@dataclass
class BeamState:
    """One sequence's search: the tokens of each beam and their summed log-probabilities, and what has finished."""

    prompt: Prompt
    beams: list
    scores: list
    finished: list = field(default_factory=list)  # (score, tokens, ended by a stop token), best first
    done: bool = False


@torch.no_grad()
def beam_search(model, prompts, stop, slots=None, position_offset=0, beams=5, batch_size=32, length_penalty=1.0):
    """Prompts -> a list of Generated, in the same order: for each the hypothesis of the highest score.

    stop: ids that end a sequence. batch_size: rows of the cache, each for a sequence with all its beams."""
    generate.check_prompts(model, prompts, position_offset)
    results, waiting = [Generated() for _ in prompts], generate.longest_first(prompts)
    rows = min(max(1, batch_size), len(waiting))
    stop, capacity = set(stop), max((len(p.ids) + p.max_new * beams for p in prompts), default=0)
    running, numbers = [], []  # the BeamState of each row, and its prompt's number

    def advance_rows(logits, first):
        """logits (B, beams, vocab_size) of the rows from `first` on -> their new beams; what is done leaves its row."""
        states, device = running[first:], model.device
        parents = select(states, logits, stop, length_penalty)
        newest = [[tokens[-1] for tokens in state.beams] for state in states]
        parents, cache.ids[first : len(running)] = to_device(torch.tensor([parents, newest]), device)
        row = torch.arange(first, len(running), device=device)[:, None]
        cache.visible[first : len(running)] = cache.visible[row, parents]
        for r in reversed(range(first, len(running))):
            if running[r].done:
                results[numbers[r]] = Generated(*running[r].finished[0][1:])
                generate.evict(cache, r, running, numbers)

    with borrow_cache(model, rows, capacity, slots, beams) as cache:
        while waiting or running:
            B = len(running)
            if generate.should_admit(waiting, running, rows):
                new, logits = generate.admit(model, cache, waiting, prompts, B, position_offset)
                running += [BeamState(prompts[n], [[]] * beams, [0.0] + [-torch.inf] * (beams - 1)) for n in new]
                numbers += new
                advance_rows(logits[:, None].expand(-1, beams, -1), B)  # all beams are the same yet: only the first counts
            else:
                advance_rows(decode_one_token(model, cache, B), 0)
    return results


def select(states, logits, stop, length_penalty):
    """Give each sequence its new beams. logits (B, beams, vocab_size) -> the beam that each of them continues: a list
    of `beams` numbers for each sequence."""
    scores = to_device(torch.tensor([state.scores for state in states]), logits.device)  # (B, beams)
    logp = logits.float().log_softmax(dim=-1) + scores[:, :, None]
    likeliest = logp.flatten(1).topk((len(stop) + 1) * scores.size(1), dim=1)  # (B, (len(stop) + 1) * beams)
    found = torch.stack([likeliest.values.view(torch.int32), likeliest.indices.int()]).cpu()  # one wait: float32 as its bits
    parents = []
    for state, scores, flat in zip(states, found[0].view(torch.float32).tolist(), found[1].tolist()):
        candidates = [(score, *divmod(i, logits.size(-1))) for score, i in zip(scores, flat)]
        parents.append(sort_candidates(state, candidates, stop, length_penalty))
    return parents


def sort_candidates(state, candidates, stop, length_penalty):
    """Candidates (score, parent beam, token), best first, become finished hypotheses and new beams -> their parents."""
    old, kept, beams = state.beams, [], len(state.beams)
    length = len(old[0]) + 1  # of a hypothesis that ends now, its stop token included
    last = length == state.prompt.max_new
    for rank, (score, parent, token) in enumerate(candidates):
        stops = token in stop
        if (stops or last) and rank < beams:
            tokens = old[parent] if stops else old[parent] + [token]
            state.finished.append((score / length**length_penalty, tokens, stops))
        if not stops and len(kept) < beams:
            kept.append((score, parent, token))
    state.beams = [old[parent] + [token] for _, parent, token in kept]
    state.scores = [score for score, _, _ in kept]
    state.finished = sorted(state.finished, key=lambda hypothesis: -hypothesis[0])[:beams]
    beaten = len(state.finished) == beams and state.scores[0] / length**length_penalty <= state.finished[-1][0]
    state.done = beaten or last
    return [parent for _, parent, _ in kept]
