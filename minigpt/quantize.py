"""Frozen weights as decoding on a CPU reads them fastest.

A step of a small batch takes as long as reading all weights does. `prepack` puts bfloat16 weights, half of float32's
bytes, into the blocks in which the CPU's library multiplies them, which it would otherwise do again for each product.
`quantize` rounds float32 weights to 8 bits, a quarter of the bytes, with one scale for each output, and what they are
multiplied with to 8 bits, too, with one scale for each row, so that a sentence does not depend on its neighbours:

    weight[n] = scale[n] * eight_bits[n]        scale[n] = max |weight[n]| / 127
    x[m]      = scale[m] * eight_bits[m]        scale[m] = max |x[m]| / 127

Their product is a sum of whole numbers, exact in 32 bits. All else stays in float32. Two libraries within torch multiply
so, and which is the faster depends on the CPU: `fastest_product` measures it.

Both change a model in place, one matrix at a time, and leave it fit for decoding only: there are no gradients.
"""

import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from minigpt.config import ACTIVATIONS

NOTHING = ("none", [], "")  # what a packed product does to its result
ROWS = 8  # of the batch for which bfloat16 weights are packed
MIDDLE = 128  # both libraries take x without a sign: from 1 to 255
TINY = torch.finfo(torch.float32).tiny


def multiplies_bf16():
    """Has this CPU instructions for bfloat16? Elsewhere it is emulated, many times slower than float32."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native or not torch.cpu._is_avx2_supported()  # of x86 the library also takes what it must emulate


def prepack(model):
    """For a model in bfloat16, on a CPU that multiplies it; on others this does nothing."""
    if multiplies_bf16():
        _replace(model, PackedConv1D, PackedEmbedding)
        for block in model.h if ACTIVATIONS[model.config.activation_function] == "gelu_tanh" else ():
            block.mlp.c_fc.then, block.mlp.activate = ("gelu", [], "tanh"), nn.Identity()  # in the product itself
    return model


def quantize(model, product):
    """For a model in float32 on a CPU. product: OneDNN or FBGEMM."""
    levels = 64 if saturates(product) else 127
    return _replace(
        model, lambda layer: Int8Linear(layer, product, levels), lambda layer: Int8Embedding(layer, product, levels)
    )


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
        return torch.ops.mkldnn._linear_pointwise(hidden, self.head, None, *NOTHING).float()


def _packed(weight):
    """(n_out, n_in) -> a tensor that only _linear_pointwise understands."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


# 8 bits


class OneDNN:
    """weight (n_out, n_in) int8, scale (n_out,) -> a product of x (N, n_in), numbers from -1 to 1, rounded to 1/127."""

    def __init__(self, weight, scale):
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.zeros = scale / 127, torch.zeros(len(scale), dtype=torch.int32)
        self.shift = -MIDDLE * self.scale * weight.sum(dim=1)  # as a bias; the library would sum up at each call
        self.half_up = torch.tensor(MIDDLE + 0.5)

    def __call__(self, x):
        x = torch.add(self.half_up, x, alpha=127).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self.weight, self.scale, self.zeros, self.shift, 1.0, 0, torch.float32, *NOTHING
        )


class FBGEMM:
    """The same product."""

    def __init__(self, weight, scale):
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():  # torch means to drop tensors of this kind; its version is pinned
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(weight, None)

    def __call__(self, x):
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / 127, MIDDLE, self.weight)


def saturates(product):
    """Does this CPU add pairs of products in 16 bits? Two of 255 * 127 are too much for that, two of 255 * 64 are not."""
    full = torch.full((8, 64), 127, dtype=torch.int8)
    return not torch.allclose(product(full, torch.ones(8))(torch.ones(1, 64)), torch.tensor(64 * 127.0))


def fastest_product(model):
    """OneDNN or FBGEMM, measured on one of the model's matrices with 1 row and with 32, in a few ms. None on a CPU for
    which torch has neither (x86 before AVX2, others)."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    weight, scale = rounded(model.h[0].mlp.c_fc.weight.T, 127)
    seconds = {}
    for kind in (OneDNN, FBGEMM):
        product, seconds[kind] = kind(weight, scale), 0
        for rows in (1, 32):
            x = torch.ones(rows, weight.size(1))
            seconds[kind] += min(clock(product, x) for _ in range(5))
    return min(seconds, key=seconds.get)


def clock(run, x):
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def rounded(weight, levels):
    """(n_out, n_in) -> the same in int8, from -levels to levels, and what these count (n_out,)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / levels).clamp(min=TINY)
    return (weight / scale[:, None]).round().to(torch.int8).contiguous(), scale


class Int8Linear(nn.Module):
    def __init__(self, projection, product, levels):
        super().__init__()
        self.product = product(*rounded(projection.weight.T, levels))
        self.register_buffer("bias", projection.bias)

    def forward(self, x):
        size = largest(x)
        return torch.addcmul(self.bias, self.product(x / size), size)


class Int8Embedding(nn.Module):
    """With a second copy of the weights, packed, for the head."""

    def __init__(self, embedding, product, levels):
        super().__init__()
        weight, scale = rounded(embedding.weight, levels)
        self.product = product(weight, scale)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids):
        return F.embedding(ids, self.weight) * self.scale[ids][:, None]

    def logits(self, hidden):
        size = largest(hidden)
        return self.product(hidden / size).mul_(size)


def largest(x):
    """max |x| of each row."""
    return x.abs().amax(dim=-1, keepdim=True).clamp_(min=TINY)
