"""Frozen weights as decoding on a CPU reads them fastest.

A step of a small batch takes as long as reading all weights does. `prepack` puts them into the blocks in which oneDNN
multiplies them, which it would otherwise do again for each product; bfloat16 has half of float32's bytes. `quantize` rounds float32 weights to 8 bits, a quarter of the bytes, with one scale for each output, and what they are
multiplied with to 8 bits, too, with one scale for each row, so that a sentence does not depend on its neighbours. What
GELU gives is nearly all positive, so a row is counted from the middle of its range:

    weight[n] = scale[n] * eight_bits[n]                    scale[n] = max |weight[n]| / 127
    x[m]      = middle[m] + half[m] / 127 * eight_bits[m]   half[m]  = (max x[m] - min x[m]) / 2

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
GELU = {"gelu_tanh": ("gelu", [], "tanh"), "gelu": ("gelu", [], "none")}
ROWS = 8  # of the batch for which weights are packed
PAYS = 0.8  # of the time of a product of weights as they are, at most, for packing them in float32
MIDDLE = 128  # both libraries take x without a sign: from 1 to 255
TINY = torch.finfo(torch.float32).tiny


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
        then = GELU.get(ACTIVATIONS[model.config.activation_function])
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
    step = 1 << max(0, len(x).bit_length() - 4)
    rows = F.pad(x, (0, 0, 0, -len(x) % step))
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *then)[: len(x)]


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
    """OneDNN or FBGEMM, measured on one matrix with 1 row and with 32, in a few ms. None on a CPU for which torch has
    neither (x86 before AVX2, others)."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    weight, scale = rounded(model.h[0].mlp.c_fc.weight.T, 127)
    products, inputs = [OneDNN(weight, scale), FBGEMM(weight, scale)], [torch.ones(n, weight.size(1)) for n in (1, 32)]
    return type(min(products, key=lambda product: sum(seconds(product, x) for x in inputs)))


def seconds(run, x):
    """The least that run(x) takes, of several times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return min(times)


def rounded(weight, levels):
    """(n_out, n_in) -> the same in int8, from -levels to levels, and what these count (n_out,)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / levels).clamp(min=TINY)
    return (weight / scale[:, None]).round().to(torch.int8).contiguous(), scale


class Int8Linear(nn.Module):
    def __init__(self, projection, product, levels):
        super().__init__()
        weight, scale = rounded(projection.weight.T, levels)
        self.product = product(weight, scale)
        self.register_buffer("bias", projection.bias)
        self.register_buffer("ones", scale * weight.sum(dim=1))  # the product with a row of ones

    def forward(self, x):
        middle, half = span(x)
        out = torch.addcmul(self.bias, middle, self.ones)
        return out.addcmul_(self.product((x - middle).div_(half)), half)


class Int8Embedding(nn.Module):
    """With a second copy of the weights, packed, for the head."""

    def __init__(self, embedding, product, levels):
        super().__init__()
        weight, scale = rounded(embedding.weight, levels)
        self.product = product(weight, scale)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("ones", scale * weight.sum(dim=1))

    def forward(self, ids):
        return F.embedding(ids, self.weight) * self.scale[ids][:, None]

    def logits(self, hidden):
        middle, half = span(hidden)
        return self.product((hidden - middle).div_(half)).mul_(half).addcmul_(middle, self.ones)


def span(x):
    """The middle of each row's range, and half of its width."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    return (low + high) / 2, ((high - low) / 2).clamp_(min=TINY)
