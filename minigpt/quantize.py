"""Frozen weights as decoding on a CPU reads them fastest.

A step of a small batch takes as long as reading all weights does. `prepack` puts bfloat16 weights, half of float32's
bytes, into the blocks in which the CPU's library multiplies them, which it would otherwise do again for each product.
`quantize` rounds them to 8 bits, half of that again, with one scale for each output; activations stay in bfloat16:

    weight[n] = scale[n] * eight_bits[n]        scale[n] = max |weight[n]| / 127

Both change a model in place, one matrix at a time, and leave it fit for decoding only: there are no gradients.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minigpt.config import ACTIVATIONS

NOTHING = ("none", [], "")  # what a packed product does to its result
ROWS = 8  # up to so many, torch's product of bfloat16 and 8 bits is the faster; beyond, weights are widened first
BLOCK = 32  # that product reads whole blocks of so many weights


def prepack(model):
    """For a model in bfloat16, on a CPU that multiplies it; on others this does nothing."""
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _replace(model, PackedConv1D, PackedEmbedding)
        for block in model.h if ACTIVATIONS[model.config.activation_function] == "gelu_tanh" else ():
            block.mlp.c_fc.then, block.mlp.activate = ("gelu", [], "tanh"), nn.Identity()  # in the product itself
    return model


def quantize(model):
    """For a model in bfloat16, on any CPU."""
    return _replace(model, Int8Linear, Int8Embedding)


def _replace(model, projection, embedding):
    for block in model.h:
        for layer in (block.attn, block.mlp):
            for name in ("c_attn", "c_fc", "c_proj"):
                if hasattr(layer, name):
                    setattr(layer, name, projection(getattr(layer, name)))
    model.wte = embedding(model.wte)
    return model


class PackedConv1D(nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.weight, self.then = _packed(projection.weight.T), NOTHING
        self.register_buffer("bias", projection.bias)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.then)


class PackedEmbedding(nn.Module):
    """With a second copy of the weights, packed, for the head."""

    def __init__(self, embedding):
        super().__init__()
        self.register_buffer("weight", embedding.weight)
        self.head = _packed(embedding.weight)

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def logits(self, hidden):
        return torch.ops.mkldnn._linear_pointwise(hidden, self.head, None, *NOTHING)


def _packed(weight):
    """(n_out, n_in) -> a tensor that only _linear_pointwise understands."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


class Int8Weight(nn.Module):
    def __init__(self, weight):
        """weight: (n_out, n_in)."""
        super().__init__()
        weight = weight.float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        self.register_buffer("scale", scale)  # (n_out,)
        self.register_buffer("weight", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))

    def product(self, x):
        """x (N, n_in) in bfloat16 -> (N, n_out)."""
        if len(x) <= ROWS and x.size(1) % BLOCK == 0:
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        return x @ self.weight.T.to(x.dtype) * self.scale


class Int8Linear(Int8Weight):
    def __init__(self, projection):
        super().__init__(projection.weight.T.contiguous())
        self.register_buffer("bias", projection.bias)

    def forward(self, x):
        return self.product(x) + self.bias


class Int8Embedding(Int8Weight):
    def __init__(self, embedding):
        super().__init__(embedding.weight)

    def forward(self, ids):
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][:, None]

    def logits(self, hidden):
        return self.product(hidden.reshape(-1, hidden.size(-1))).view(*hidden.shape[:-1], -1)
