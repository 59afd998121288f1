"""Slots as the output of a small network while they are trained (Li & Liang 2021, section 4.3).

    embedding (banks, prefix_len, n_embd) -> Linear -> tanh (512) -> Linear -> 2 * n_layer * n_embd numbers a slot

What comes out is z of TrainableBanks: the deviation of a slot from where it starts, in units. The last layer is zero at
first, so that training begins exactly at --init. All banks share the network and have embeddings of their own. For GPT-2
XL it is 80 million numbers: 1.3 GB with gradients and AdamW's moments. A prefix file has the slots alone.
"""

import torch
from torch import nn

from prefix.banks import TrainableBanks

INNER = 512


class Reparametrised(TrainableBanks):
    """TrainableBanks whose z is network(embedding)."""

    def __init__(self, start, units=None, seed=0):
        """start: Banks, all of one prefix_len."""
        super().__init__(start, units, train=())
        n_layer, n_head, prefix_len, head_dim = self.key[0].shape
        n_embd = n_head * head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(len(self.names), prefix_len, n_embd))
            self.network = nn.Sequential(nn.Linear(n_embd, INNER), nn.Tanh(), nn.Linear(INNER, 2 * n_layer * n_embd))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def moves(self):
        n_layer, n_head, _, head_dim = self.key[0].shape
        z = self.network(self.embedding).unflatten(-1, (n_layer, 2, n_head, head_dim))
        return z.permute(0, 3, 2, 4, 1, 5)  # (banks, 2, n_layer, n_head, prefix_len, head_dim)
