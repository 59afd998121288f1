"""How training moves slots: each by itself, in the base's own units, or all of them through one small network.

Both are gone after training: a prefix file has the slots alone.
"""

import torch
from torch import nn

from prefix.banks import Banks

INNER = 512


class TrainableBanks(Banks):
    """Banks while they are trained. AdamW moves z, which counts in the base's own units:

        key = start + unit_k * z_k        value = start + unit_v * z_v

    unit_k (unit_v) is the standard deviation of the keys (values) that the base computes for text, one number for each
    layer and head. AdamW moves every number by about the learning rate in a step, however small its gradient; so a
    rate means the same on every base. (Scale a base's keys by c and its queries by 1/c: it is the same function, and
    its slots have c times as far to go; in units the distance is the same, so they need as many steps.)"""

    def __init__(self, start, units=None, train=None):
        """start: Banks. units: two (n_layer, n_head, 1, 1), None: 1. train: names of the banks that move, None: all."""
        super().__init__(dict(zip(start.names, start.key_values())), start.position_offset, start.training_record)
        units = units or torch.ones(2, 1, 1, 1, 1, device=self.key[0].device).unbind()
        self.unit = nn.ParameterList(units)  # parameters so that they are saved with the slots; none of these moves
        self.requires_grad_(False)
        self.z = nn.ParameterList(nn.Parameter(torch.zeros(2, *key.shape, device=key.device)) for key in self.key)
        for name, z in zip(self.names, self.z):
            z.requires_grad_(train is None or name in train)

    def z_of_banks(self):
        """(z_k, z_v) of each bank."""
        return self.z

    def key_values(self):
        starts = zip(self.key, self.value, self.z_of_banks())
        return [(key + self.unit[0] * z_k, value + self.unit[1] * z_v) for key, value, (z_k, z_v) in starts]

    def moved(self):
        """The median and the largest distance of the trained slots from their start: root mean square of z, in units."""
        trained = [z.detach() for z in self.z_of_banks() if z.requires_grad]  # (2, n_layer, n_head, prefix_len, head_dim)
        distance = torch.cat([z.square().mean(dim=(0, 1, 2, 4)).sqrt() for z in trained])  # (slots,)
        return {"moved": float(distance.median()), "moved_max": float(distance.max())}


class Reparametrised(TrainableBanks):
    """TrainableBanks whose z is the output of a small network (Li & Liang 2021, section 4.3):

        embedding (banks, prefix_len, n_embd) -> Linear -> tanh (512) -> Linear -> 2 * n_layer * n_embd numbers a slot

    The last layer is zero at first, so that training begins exactly at --init. All banks share the network and have
    embeddings of their own. For GPT-2 XL it is 80 million numbers: 1.3 GB with gradients and AdamW's moments."""

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

    def z_of_banks(self):
        n_layer, n_head, _, head_dim = self.key[0].shape
        z = self.network(self.embedding).unflatten(-1, (n_layer, 2, n_head, head_dim))
        return z.permute(0, 3, 2, 4, 1, 5)  # (banks, 2, n_layer, n_head, prefix_len, head_dim)
