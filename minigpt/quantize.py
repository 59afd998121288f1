"""Frozen weights as decoding on a CPU reads them fastest.

A step of a small batch takes as long as reading all weights does. `prepack` puts them into the blocks in which oneDNN
multiplies them, which it would otherwise do again for each product; bfloat16 has half of float32's bytes. `quantize`
rounds float32 weights to 8 bits, a quarter of the bytes, with one scale for each output, and what they are multiplied
with to 8 bits, too, with a range for each row, so that a sentence does not depend on its neighbours:

    weight[n] = scale[n] * eight_bits[n]               -127 .. 127     scale[n] = max |weight[n]| / 127, see `rounded`
    x[m]      = step[m] * (eight_bits[m] + zero[m])       0 .. 255     step[m] = (max x[m] - min x[m]) / 255

Their product is a sum of whole numbers, exact in 32 bits. All else stays in float32. Two libraries within torch multiply
so, and which is the faster depends on the CPU: `fastest_product` measures it.

Both change a model in place, one matrix at a time, and leave it fit for decoding only: there are no gradients.
"""

import math
import time
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from minigpt.config import gelu_tanh

NOTHING = ("none", [], "")  # what a packed product does to its result
GELU = {gelu_tanh: ("gelu", [], "tanh"), F.gelu: ("gelu", [], "none")}
ROWS = 8  # of the batch for which weights are packed
PAYS = 0.8  # of the time of a product of weights as they are, at most, for packing them in float32
TINY = torch.finfo(torch.float32).tiny
LEAST = 6.1e-5  # step of a row, as in `one_row`, which rounds by the same rule where a row's range holds 0


def multiplies_bf16():
    """Has this CPU instructions for bfloat16? Elsewhere it is emulated, many times slower than float32."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native or not torch.cpu._is_avx2_supported()  # of x86 the library also takes what it must emulate


def prepack(model):
    """For a model on a CPU, in bfloat16 or float32: where its products are faster so. Elsewhere this does nothing."""
    if packing_pays(model):
        _replace(model, PackedConv1D, PackedEmbedding)
        then = GELU.get(model.h[0].mlp.activate)
        for block in model.h if then else ():
            block.mlp.c_fc.then, block.mlp.activate = then, nn.Identity()  # in the product itself
    return model


def packing_pays(model):
    """Whether oneDNN multiplies packed weights faster: in float32 measured on one matrix, in a few ms."""
    if model.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model.dtype == torch.bfloat16 and multiplies_bf16()
    plain, x = model.h[0].mlp.c_fc, torch.ones(ROWS, model.config.n_embd)
    return seconds(PackedConv1D(plain), x) < PAYS * seconds(plain, x)


def quantize(model, product):
    """For a model in float32 on a CPU. product: OneDNN or FBGEMM."""
    for block in model.h:
        if block.mlp.activate is gelu_tanh:
            block.mlp.activate = gelu_sigmoid
    return _replace(model, lambda layer: Int8Linear(layer, product), lambda layer: Int8Embedding(layer, product))


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
        return multiply(x, self.weight, self.bias, self.then)


class PackedEmbedding(nn.Module):
    """With a second copy of the weights, packed, for the head."""

    def __init__(self, embedding):
        super().__init__()
        self.register_buffer("weight", embedding.weight)
        self.head = _packed(embedding.weight)

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def logits(self, hidden):
        return multiply(hidden, self.head).float()


def multiply(x, weight, bias=None, then=NOTHING):
    """x (N, n_in) times packed weights -> (N, n_out). N is rounded up by an eighth at most, with rows of zeros: oneDNN
    compiles a product for each N that it meets, and keeps it."""
    more = -len(x) % (1 << max(0, len(x).bit_length() - 4))
    rows = F.pad(x, (0, 0, 0, more)) if more else x  # a pad of none would copy x
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *then)[: len(x)]


def _packed(weight):
    """(n_out, n_in) -> a tensor that only _linear_pointwise understands."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


# 8 bits


class OneDNN:
    """weight (n_out, n_in) int8, scale (n_out,) -> a product of x (N, n_in), rounded to whole numbers from 0 to 255."""

    def __init__(self, weight, scale):
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int32)

    def __call__(self, x):
        x = (x + 0.5).clamp_(max=255).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, *NOTHING
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
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 0, self.weight)

    def one_row(self, x):
        """x (1, n_in), any numbers: its range is found in the call itself. A batch would share one range."""
        return torch.ops.quantized.linear_dynamic(x, self.weight)


@cache
def saturates(product):
    """Does this CPU add two products that stand side by side in 16 bits? 255 * 127 + 255 * 127 is too much for that."""
    full = torch.full((8, 64), 127, dtype=torch.int8)
    return not torch.allclose(product(full, torch.ones(8))(torch.full((1, 64), 255.0)), torch.tensor(64 * 127 * 255.0))


def fastest_product(model):
    """OneDNN or FBGEMM, measured on one matrix with 1 row and with 32, in a few ms. None on a CPU for which torch has
    neither (x86 before AVX2, others)."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    weight, scale = rounded(model.h[0].mlp.c_fc.weight.T)
    ways = [Int8(product, weight, scale) for product in (OneDNN, FBGEMM)]
    inputs = [torch.ones(n, weight.size(1)) for n in (1, 32)]
    return type(min(ways, key=lambda way: sum(seconds(way, x) for x in inputs)).product)


def seconds(run, x):
    """The least that run(x) takes, of several times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return min(times)


def rounded(weight, pairs_fit=False):
    """(n_out, n_in) -> the same in int8, and what one step counts (n_out,). pairs_fit: the sum of two neighbours, too, is at
    most 128, so that 255 times as much fits 16 bits."""
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1)
    if pairs_fit:
        pairs = F.pad(weight, (0, weight.size(1) % 2)).unflatten(1, (-1, 2)).sum(dim=2)  # (n_out, n_in / 2)
        largest = largest.maximum(pairs.abs().amax(dim=1))
    scale = (largest / 127).clamp(min=TINY)
    return (weight / scale[:, None]).round().to(torch.int8).contiguous(), scale


class Int8:
    """weight (n_out, n_in) int8, scale (n_out,) -> the product with any x (N, n_in), (N, n_out) in float32."""

    def __init__(self, product, weight, scale):
        self.product, self.ones = product(weight, scale), scale * weight.sum(dim=1)  # ones: the product with a row of ones

    def __call__(self, x):
        if len(x) == 1 and hasattr(self.product, "one_row"):
            return self.product.one_row(x)
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # aminmax takes eight times as long
        step = ((high - low) / 255).clamp_(min=LEAST)
        zero = (low / step).round_()
        return self.product((x / step).sub_(zero)).addcmul_(zero, self.ones).mul_(step)


def gelu_sigmoid(x):
    """gelu_tanh, x (1 + tanh(u)) / 2, as x sigmoid(2u): on a CPU it takes half the time where rows are many."""
    if len(x) < ROWS:
        return gelu_tanh(x)
    a = 2 * math.sqrt(2 / math.pi)  # 2u = a (x + 0.044715 x^3)
    return torch.addcmul(x.new_tensor(a), x, x, value=0.044715 * a).mul_(x).sigmoid_().mul_(x)


class Int8Linear(nn.Module):
    def __init__(self, projection, product):
        super().__init__()
        self.multiply = Int8(product, *rounded(projection.weight.T, saturates(product)))
        self.register_buffer("bias", projection.bias)

    def forward(self, x):
        return self.multiply(x).add_(self.bias)


class Int8Embedding(nn.Module):
    """With a second copy of the weights, packed, for the head."""

    def __init__(self, embedding, product):
        super().__init__()
        weight, scale = rounded(embedding.weight, saturates(product))
        self.logits = Int8(product, weight, scale)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids):
        return F.embedding(ids, self.weight) * self.scale[ids][:, None]
