"""Slots as the output of a small network while they are trained (Li & Liang 2021, section 4.3).

    embedding (banks, prefix_len, n_embd) -> Linear -> tanh (512) -> Linear -> 2 * n_layer * n_embd numbers a slot

What comes out is added to where the slots start. The last layer is zero at first, so that training begins exactly at
--init. All banks share the network and have embeddings of their own: while there are fewer slots than its 512 units,
it can still give each slot any key and value. For GPT-2 XL it is 80 million numbers: 1.3 GB with their gradients and
AdamW's moments, and a second network would take as much again. It is needed no longer than training lasts: a prefix
file has the slots alone.
"""

import torch
from torch import nn

from prefix.banks import Banks

INNER = 512


class Reparametrised(Banks):
    """Banks whose slots are `start` + network(embedding). `start` itself stays as it is."""

    def __init__(self, start, seed=0):
        """start: Banks, all of one prefix_len."""
        super().__init__(dict(zip(start.names, start.pairs())), start.position_offset, start.training_record)
        self.requires_grad_(False)
        n_layer, n_head, prefix_len, head_dim = self.key[0].shape
        n_embd = n_head * head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(len(self.names), prefix_len, n_embd))
            self.network = nn.Sequential(nn.Linear(n_embd, INNER), nn.Tanh(), nn.Linear(INNER, 2 * n_layer * n_embd))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def pairs(self):
        n_layer, n_head, _, head_dim = self.key[0].shape
        moved = self.network(self.embedding).unflatten(-1, (n_layer, 2, n_head, head_dim))
        moved = moved.permute(0, 3, 2, 4, 1, 5)  # (banks, 2, n_layer, n_head, prefix_len, head_dim)
        return [(key + by[0], value + by[1]) for key, value, by in zip(self.key, self.value, moved)]
