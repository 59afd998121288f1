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

from minigpt.attention import to_device
from minigpt.generate import Generated, continuous_batch, evict


@dataclass
class BeamState:
    """One sequence's search: the tokens of each beam and their summed log-probabilities, and what has finished."""

    max_new: int
    beams: list
    scores: list
    finished: list = field(default_factory=list)  # (score, tokens, ended by a stop token), best first
    done: bool = False


@torch.no_grad()
def beam_search(model, prompts, stop, slots=None, position_offset=0, beams=5, batch_size=32, length_penalty=1.0):
    """Prompts -> a list of Generated, in the same order: for each the hypothesis of the highest score.

    stop: ids that end a sequence. batch_size: rows of the cache, each for a sequence with all its beams."""
    first_counts = [0.0] + [-torch.inf] * (beams - 1)  # all beams are the same yet
    states, stop = [BeamState(prompt.max_new, [[]] * beams, first_counts) for prompt in prompts], set(stop)
    for cache, running, first, logits in continuous_batch(model, prompts, slots, position_offset, batch_size, beams):
        advanced, rows = [states[n] for n in running[first:]], torch.arange(first, len(running), device=model.device)
        parents = select(advanced, logits, stop, length_penalty)
        newest = [[tokens[-1] for tokens in state.beams] for state in advanced]
        parents, cache.ids[first : len(running)] = to_device(torch.tensor([parents, newest]), model.device)
        cache.visible[first : len(running)] = cache.visible[rows[:, None], parents]
        evict(cache, running, lambda n: states[n].done)
    return [Generated(*state.finished[0][1:]) if state.done else Generated() for state in states]


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
    last = length == state.max_new
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
