"""A decoding step on a GPU in seven launches a layer, two kinds of them in Triton.

decode_kernel is the attention: new keys and values go into the cache, and each row's queries attend to them, to the
row's own entries and to the slots, in one softmax. A program owns one row and head. Its queries, one for each beam, are one
block. It reads on the device how many entries its row has, so one CUDA graph serves every length. cache.attend_cached is
the reference. Memory: H heads, D head_dim, Q queries a row; qkv (rows * Q, 3 H D), out (rows * Q, H D); the rest as in
cache.Cache. BQ is Q, rounded up to what tl.dot takes; the other sizes are those of kernels.py.

norm_kernel is a layer norm which also adds the next projection's bias to the residual stream. So that projection is one
product, summed onto the stream where it lies.
"""

import torch
import triton
import triton.language as tl

from minigpt.config import gelu_tanh
from minigpt.kernels import LOG2_E, _dot, _load, _online_softmax, _sees_slots, _store


@triton.jit(do_not_specialize=["rows", "Q", "S", "capacity"])
def decode_kernel(
    qkv, out, key, value, visible, state, slot_key, slot_value, bank, rows, Q, S, capacity, scale,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. scale is log2(e) / sqrt(head_dim), so that exp2 serves."""
    row, head, C = tl.program_id(0).to(tl.int64), tl.program_id(1), H * D
    queries, columns = tl.arange(0, BQ), tl.arange(0, BD)
    n = tl.load(state + row).to(tl.int32)  # the row's entries before this step
    masks = tl.zeros((BQ,), tl.int32) + tl.load(state + 2 * rows + row).to(tl.int32)
    new, entries = qkv + row * Q * 3 * C + head * D, (row * H + head) * capacity * D
    q = _load(new, queries, 3 * C, columns, Q, D)
    own_k = _load(new + C, queries, 3 * C, columns, Q, D)
    own_v = _load(new + 2 * C, queries, 3 * C, columns, Q, D)
    _store(key + entries + n * D, queries, D, columns, Q, own_k, D)
    _store(value + entries + n * D, queries, D, columns, Q, own_v, D)
    # Of the new entries each query sees its own alone: the softmax begins with it, and reads none back from the cache.
    m = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * scale
    total = tl.full((BQ,), 1.0, tl.float32)
    acc = own_v.to(tl.float32)
    for s in range(0, S, BN):
        slots = s + tl.arange(0, BN)
        k = _load(slot_key + head * S * D, slots, D, columns, S, D)
        v = _load(slot_value + head * S * D, slots, D, columns, S, D)
        banks = tl.load(bank + slots, mask=slots < S, other=0)
        scores = _dot(q, tl.trans(k), EXACT) * scale
        scores = tl.where(_sees_slots(masks, banks, slots, S), scores, float("-inf"))
        m, total, acc = _online_softmax(m, total, acc, scores, v, EXACT)
    for j in range(0, n, BN):
        keys = j + tl.arange(0, BN)
        k = _load(key + entries, keys, D, columns, n, D)
        v = _load(value + entries, keys, D, columns, n, D)
        inside = (queries[:, None] < Q) & (keys[None, :] < n)
        seen = tl.load(visible + (row * Q + queries[:, None]) * capacity + keys[None, :], mask=inside, other=0)
        scores = tl.where(seen != 0, _dot(q, tl.trans(k), EXACT) * scale, float("-inf"))
        m, total, acc = _online_softmax(m, total, acc, scores, v, EXACT)
    _store(out + row * Q * C + head * D, queries, C, columns, Q, acc / total[:, None], D)


def constants(n_head, head_dim, beams, dtype):
    """What the kernel is compiled for: one variant for up to 16 beams. float32 has half the room, as in kernels.py."""
    exact, width = dtype == torch.float32, max(16, triton.next_power_of_2(head_dim))
    queries, keys = max(16, triton.next_power_of_2(beams)), max(16, 2048 // width) if exact else 32
    return dict(H=n_head, D=head_dim, BD=width, BQ=queries, BN=keys, EXACT=exact, num_warps=2, num_stages=2)


def decode_attention(qkv, cache, layer):
    """cache.decode_step's kernel path: qkv (B * Q, 3C), the new tokens of the first B rows -> (B * Q, C)."""
    key, value, slots = cache.key[layer], cache.value[layer], cache.layers[layer]
    (rows, n_head, capacity, head_dim), Q = key.shape, cache.ids.size(1)
    if slots is None:
        S, side = 0, (key, value, qkv.new_empty(0, dtype=torch.int32))
    else:
        S, side = slots.bank.numel(), (slots.key, slots.value, slots.bank)
    out = torch.empty(len(qkv), n_head * head_dim, device=qkv.device, dtype=qkv.dtype)
    decode_kernel[(len(qkv) // Q, n_head)](
        qkv, out, key, value, cache.visible.view(torch.uint8), cache.state, *side, rows, Q, S, capacity,
        LOG2_E * head_dim**-0.5, **constants(n_head, head_dim, Q, qkv.dtype),
    )  # fmt: skip
    return out


@triton.jit
def norm_kernel(x, weight, bias, add, out, eps, C: tl.constexpr, BC: tl.constexpr):
    """One program: a row of x (N, C). Its norm goes to out; then `add` (C,) is added to the row itself."""
    columns = tl.arange(0, BC)
    row, inside = tl.program_id(0).to(tl.int64) * C + columns, columns < C
    values = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, values - tl.sum(values, 0) / C, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(add + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, (centered * scale * w + b).to(out.dtype.element_ty), mask=inside)
    tl.store(x + row, (values + added).to(x.dtype.element_ty), mask=inside)


def norm_and_add(x, ln, add):
    """x (N, C) -> ln(x); x itself becomes x + add."""
    out, C = torch.empty_like(x), x.size(1)
    norm_kernel[(len(x),)](x, ln.weight, ln.bias, add, out, ln.eps, C, triton.next_power_of_2(C))
    return out


def decode_blocks(model, cache, x):
    """model.GPT.blocks for a step: x (N, C), which is overwritten -> (N, C)."""
    for i, block in enumerate(model.h):
        attn, mlp = block.attn, block.mlp
        h = norm_and_add(x, block.ln_1, attn.c_proj.bias)
        x.addmm_(decode_attention(attn.c_attn(h), cache, i), attn.c_proj.weight)
        h = norm_and_add(x, block.ln_2, mlp.c_proj.bias)
        if mlp.activate is gelu_tanh:  # cuBLAS applies it to a product's sums
            h = torch._addmm_activation(mlp.c_fc.bias, h, mlp.c_fc.weight, use_gelu=True)
        else:
            h = mlp.activate(mlp.c_fc(h))
        x.addmm_(h, mlp.c_proj.weight)
    return model.ln_f(x)
