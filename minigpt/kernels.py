"""The fused attention of attention.py as Triton kernels, forward and backward (FlashAttention-2, Dao 2023, section 3).

A program takes one head and a block of query tokens, which it keeps in registers, and walks over two kinds of keys,
carrying a running maximum, a running sum and a running output, so that no score ever reaches memory:

    keys          slots of all banks            text of the packed row
                  0 .............. S            0 ..... start[first] ===== i ..... N
    walked over   all blocks of slots           only from the first sentence's start to the block itself
    seen if       bit bank[s] of bank_mask[i]   start[i] <= j <= i

q, k and v are read where the projection wrote them, in one (N, 3 * n_head * head_dim) buffer, and the gradients go
into one buffer of that shape. There is no mask in memory, no padding, and the slots are the same few vectors for
every sentence. Scores, softmax and all sums are float32. Backward recomputes the scores from the saved log-sum-exp:

    P = exp(scores - lse)    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    delta = rowsum(dO * O)
    dQ = dS K                dK = dS^T Q

(delta is the sum over j of P dP: the correction of the softmax's Jacobian, had without P. The code uses exp2: log2(e) is in
the scale, and lse is in base 2.) Sizes: H heads, D head_dim, BD = D rounded up to a power of two, BM queries and BN keys a
block, EXACT float32 products. Memory: qkv (N, 3 H D), out (N, H D), lse and delta (H, N), slot_key and slot_value (H, S, D),
start, end and bank_mask (N,), bank (S,).

Queries, text keys and slots each get a kernel of their own, in which a program owns what it sums into. For slots,
which every token may see, PARTS programs sum a part of the batch each and torch adds the parts: no atomics, so that two
runs give the same bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl

BLOCK = 64  # queries that a program handles at a time; of keys, or slots, half as many
LOG2_E = 1.4426950408889634
PARTS = 16  # that the batch is cut into for the gradients of slots
# Numbers that change with the batch: Triton would compile anew where one is 1 or a multiple of 16.
jit = triton.jit(do_not_specialize=["N", "S", "part"])


@triton.jit
def _load(base, rows, stride, columns, n_rows, D: tl.constexpr):
    """Rows of head_dim elements each -> (len(rows), len(columns)), zero outside."""
    inside = (rows[:, None] >= 0) & (rows[:, None] < n_rows) & (columns[None, :] < D)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, stride, columns, n_rows, values, D: tl.constexpr):
    inside = (rows[:, None] < n_rows) & (columns[None, :] < D)
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    """a @ b, summed in float32; EXACT: float32 products, no tf32."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _sees_text(rows, start, keys):
    return (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])


@triton.jit
def _sees_slots(bank_mask, bank, slots, S):
    return (((bank_mask[:, None] >> bank[None, :]) & 1) == 1) & (slots[None, :] < S)


@triton.jit
def _online_softmax(m, total, acc, scores, v, EXACT: tl.constexpr):
    """One block of keys into the running softmax: m (M,) maximum, total (M,) sum, acc (M, D) output."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, EXACT)
    return m_new, total * shrink + tl.sum(p, 1), acc


@jit
def forward_kernel(
    qkv, out, lse, slot_key, slot_value, start, bank_mask, bank, N, S, scale,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. scale is log2(e) / sqrt(head_dim), so that exp2 serves; lse is base 2."""
    first, head, C = tl.program_id(0) * BM, tl.program_id(1), H * D
    rows, columns = first + tl.arange(0, BM), tl.arange(0, BD)
    q = _load(qkv + head * D, rows, 3 * C, columns, N, D)
    begins = tl.load(start + rows, mask=rows < N, other=N)  # rows past the end see nothing
    masks = tl.load(bank_mask + rows, mask=rows < N, other=0)
    m = tl.full((BM,), -1e30, tl.float32)  # not -inf: a block may begin with keys that a query does not see
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for s in range(0, S, BN):
        slots = s + tl.arange(0, BN)
        k = _load(slot_key + head * S * D, slots, D, columns, S, D)
        v = _load(slot_value + head * S * D, slots, D, columns, S, D)
        banks = tl.load(bank + slots, mask=slots < S, other=0)
        scores = _dot(q, tl.trans(k), EXACT) * scale
        scores = tl.where(_sees_slots(masks, banks, slots, S), scores, float("-inf"))
        m, total, acc = _online_softmax(m, total, acc, scores, v, EXACT)
    for j in range(tl.load(start + first) // BN * BN, tl.minimum(first + BM, N), BN):
        keys = j + tl.arange(0, BN)
        k = _load(qkv + C + head * D, keys, 3 * C, columns, N, D)
        v = _load(qkv + 2 * C + head * D, keys, 3 * C, columns, N, D)
        scores = _dot(q, tl.trans(k), EXACT) * scale
        scores = tl.where(_sees_text(rows, begins, keys), scores, float("-inf"))
        m, total, acc = _online_softmax(m, total, acc, scores, v, EXACT)
    _store(out + head * D, rows, C, columns, N, acc / tl.where(rows < N, total, 1.0)[:, None], D)
    tl.store(lse + head * N + rows, m + tl.log2(total), mask=rows < N)


@jit
def delta_kernel(out, grad_out, delta, N, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """delta = rowsum(dO * O), (H, N)."""
    head, C = tl.program_id(1), H * D
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    o = _load(out + head * D, rows, C, columns, N, D).to(tl.float32)
    do = _load(grad_out + head * D, rows, C, columns, N, D).to(tl.float32)
    tl.store(delta + head * N + rows, tl.sum(o * do, 1), mask=rows < N)


@triton.jit
def _score_gradient(q, k, v, do, lse, delta, seen, scale, EXACT: tl.constexpr):
    """(P, dS) of a block of queries against a block of keys, both (M, N); dS without the factor 1 / sqrt(head_dim)."""
    p = tl.exp2(tl.where(seen, _dot(q, tl.trans(k), EXACT) * scale - lse[:, None], float("-inf")))
    return p, p * (_dot(do, tl.trans(v), EXACT) - delta[:, None])


@jit
def query_gradient_kernel(
    qkv, grad_qkv, grad_out, lse, delta, slot_key, slot_value, start, bank_mask, bank, N, S, scale, factor,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head, over the keys that forward_kernel walked over. factor: 1 / sqrt(head_dim)."""
    first, head, C = tl.program_id(0) * BM, tl.program_id(1), H * D
    rows, columns = first + tl.arange(0, BM), tl.arange(0, BD)
    q = _load(qkv + head * D, rows, 3 * C, columns, N, D)
    do = _load(grad_out + head * D, rows, C, columns, N, D)
    begins = tl.load(start + rows, mask=rows < N, other=N)  # rows past the end see nothing
    masks = tl.load(bank_mask + rows, mask=rows < N, other=0)
    row_lse = tl.load(lse + head * N + rows, mask=rows < N, other=0.0)
    row_delta = tl.load(delta + head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    for s in range(0, S, BN):
        slots = s + tl.arange(0, BN)
        k = _load(slot_key + head * S * D, slots, D, columns, S, D)
        v = _load(slot_value + head * S * D, slots, D, columns, S, D)
        banks = tl.load(bank + slots, mask=slots < S, other=0)
        seen = _sees_slots(masks, banks, slots, S)
        _, ds = _score_gradient(q, k, v, do, row_lse, row_delta, seen, scale, EXACT)
        dq += _dot(ds.to(k.dtype), k, EXACT)
    for j in range(tl.load(start + first) // BN * BN, tl.minimum(first + BM, N), BN):
        keys = j + tl.arange(0, BN)
        k = _load(qkv + C + head * D, keys, 3 * C, columns, N, D)
        v = _load(qkv + 2 * C + head * D, keys, 3 * C, columns, N, D)
        _, ds = _score_gradient(q, k, v, do, row_lse, row_delta, _sees_text(rows, begins, keys), scale, EXACT)
        dq += _dot(ds.to(k.dtype), k, EXACT)
    _store(grad_qkv + head * D, rows, 3 * C, columns, N, dq * factor, D)


@jit
def key_gradient_kernel(
    qkv, grad_qkv, grad_out, lse, delta, start, end, N, scale, factor,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN text keys of one head, over the queries from there to the end of their last sentence."""
    first, head, C = tl.program_id(0) * BN, tl.program_id(1), H * D
    keys, columns = first + tl.arange(0, BN), tl.arange(0, BD)
    k = _load(qkv + C + head * D, keys, 3 * C, columns, N, D)
    v = _load(qkv + 2 * C + head * D, keys, 3 * C, columns, N, D)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for i in range(first // BM * BM, tl.load(end + tl.minimum(first + BN, N) - 1), BM):
        rows = i + tl.arange(0, BM)
        q = _load(qkv + head * D, rows, 3 * C, columns, N, D)
        do = _load(grad_out + head * D, rows, C, columns, N, D)
        begins = tl.load(start + rows, mask=rows < N, other=N)
        row_lse = tl.load(lse + head * N + rows, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + head * N + rows, mask=rows < N, other=0.0)
        p, ds = _score_gradient(q, k, v, do, row_lse, row_delta, _sees_text(rows, begins, keys), scale, EXACT)
        dv += _dot(tl.trans(p).to(do.dtype), do, EXACT)
        dk += _dot(tl.trans(ds).to(q.dtype), q, EXACT)
    _store(grad_qkv + C + head * D, keys, 3 * C, columns, N, dk * factor, D)
    _store(grad_qkv + 2 * C + head * D, keys, 3 * C, columns, N, dv, D)


@jit
def slot_gradient_kernel(
    qkv, grad_out, lse, delta, slot_key, slot_value, grad_key, grad_value, bank_mask, bank, N, S, part, scale, factor,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN slots of one head, summed over `part` queries; grad_key, grad_value (at most PARTS, H, S, D)."""
    head, split, C = tl.program_id(1), tl.program_id(2), H * D
    slots, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    k = _load(slot_key + head * S * D, slots, D, columns, S, D)
    v = _load(slot_value + head * S * D, slots, D, columns, S, D)
    banks = tl.load(bank + slots, mask=slots < S, other=0)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for i in range(split * part, tl.minimum((split + 1) * part, N), BM):
        rows = i + tl.arange(0, BM)
        q = _load(qkv + head * D, rows, 3 * C, columns, N, D)
        do = _load(grad_out + head * D, rows, C, columns, N, D)
        masks = tl.load(bank_mask + rows, mask=rows < N, other=0)
        row_lse = tl.load(lse + head * N + rows, mask=rows < N, other=0.0)
        row_delta = tl.load(delta + head * N + rows, mask=rows < N, other=0.0)
        seen = _sees_slots(masks, banks, slots, S)
        p, ds = _score_gradient(q, k, v, do, row_lse, row_delta, seen, scale, EXACT)
        dv += _dot(tl.trans(p).to(do.dtype), do, EXACT)
        dk += _dot(tl.trans(ds).to(q.dtype), q, EXACT)
    offset = (split * H + head).to(tl.int64) * S * D
    _store(grad_key + offset, slots, D, columns, S, dk * factor, D)
    _store(grad_value + offset, slots, D, columns, S, dv, D)


KERNELS = (forward_kernel, delta_kernel, query_gradient_kernel, key_gradient_kernel, slot_gradient_kernel)


@cache
def constants(kernel, n_head, head_dim, dtype):
    """What a kernel is compiled for. float32 has no tensor cores here, and half the room."""
    exact, width = dtype == torch.float32, max(16, triton.next_power_of_2(head_dim))
    sizes = dict(H=n_head, D=head_dim, BD=width, BM=BLOCK // 2 if exact else BLOCK)
    if kernel is delta_kernel:
        return sizes
    stages = 3 if kernel in (forward_kernel, query_gradient_kernel) else 2
    if exact or head_dim > 64:
        stages = 1
    return dict(**sizes, BN=BLOCK // 2, EXACT=exact, num_warps=4, num_stages=stages)  # the fastest on an H100


def triton_attention(qkv, n_head, packed, slots):
    """backends.attend's kernel path: qkv (N, 3C), the Slots of one layer -> (N, C)."""
    return FusedAttention.apply(qkv, slots.key, slots.value, slots.bank, packed, n_head)


class FusedAttention(torch.autograd.Function):
    """qkv (N, 3C), slot keys and values (n_head, S, head_dim) in float32 -> (N, C). Slot gradients come out float32."""

    @staticmethod
    def forward(ctx, qkv, slot_key, slot_value, bank, packed, n_head):
        N, C, S = len(qkv), qkv.size(1) // 3, len(bank)
        qkv = qkv.contiguous()
        key, value = slot_key.to(qkv.dtype).contiguous(), slot_value.to(qkv.dtype).contiguous()
        out = torch.empty(N, C, device=qkv.device, dtype=qkv.dtype)
        lse = torch.empty(n_head, N, device=qkv.device, dtype=torch.float32)
        sizes = constants(forward_kernel, n_head, C // n_head, qkv.dtype)
        scale = LOG2_E * (C // n_head) ** -0.5
        forward_kernel[(triton.cdiv(N, sizes["BM"]), n_head)](
            qkv, out, lse, key, value, packed.start, packed.bank_mask, bank, N, S, scale, **sizes
        )
        ctx.save_for_backward(qkv, out, lse, key, value, bank)
        ctx.packed, ctx.n_head = packed, n_head
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, out, lse, key, value, bank = ctx.saved_tensors
        packed, n_head, (N, C), S = ctx.packed, ctx.n_head, out.shape, len(bank)
        sizes = {kernel: constants(kernel, n_head, C // n_head, qkv.dtype) for kernel in KERNELS}
        factor = (C // n_head) ** -0.5
        scale = LOG2_E * factor
        grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
        block = sizes[forward_kernel]["BM"]
        blocks = triton.cdiv(N, block)
        delta_kernel[(blocks, n_head)](out, grad_out, delta, N, **sizes[delta_kernel])
        grad_qkv = grad_key = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_qkv = torch.empty_like(qkv)
            query_gradient_kernel[(blocks, n_head)](
                qkv, grad_qkv, grad_out, lse, delta, key, value, packed.start, packed.bank_mask, bank, N, S, scale, factor,
                **sizes[query_gradient_kernel],
            )  # fmt: skip
            key_blocks = triton.cdiv(N, sizes[key_gradient_kernel]["BN"])
            key_gradient_kernel[(key_blocks, n_head)](
                qkv, grad_qkv, grad_out, lse, delta, packed.start, packed.end, N, scale, factor,
                **sizes[key_gradient_kernel],
            )  # fmt: skip
        if S and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            part = triton.cdiv(blocks, PARTS) * block
            splits = triton.cdiv(N, part)
            grad_key = torch.empty(splits, *key.shape, device=qkv.device, dtype=torch.float32)
            grad_value = torch.empty_like(grad_key)
            slot_blocks = triton.cdiv(S, sizes[slot_gradient_kernel]["BN"])
            slot_gradient_kernel[(slot_blocks, n_head, splits)](
                qkv, grad_out, lse, delta, key, value, grad_key, grad_value, packed.bank_mask, bank, N, S, part,
                scale, factor, **sizes[slot_gradient_kernel],
            )  # fmt: skip
            grad_key, grad_value = grad_key.sum(0), grad_value.sum(0)
        return grad_qkv, grad_key, grad_value, None, None, None
