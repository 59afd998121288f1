"""The decode kernel against the plain path in float64. Without a GPU it runs in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minigpt import GPT, GPTConfig, decode_kernel  # noqa: E402
from minigpt.attention import Slots  # noqa: E402
from minigpt.cache import attend_cached, bias_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3}  # of ||ours - float64|| / ||float64||
CASES = [
    # rows, rows that are running, beams, heads, head_dim, slots of each bank, capacity
    (2, 2, 1, 1, 16, None, 40),
    (5, 3, 1, 2, 64, [10, 10], 130),  # a full row of 4 blocks of 32 keys and one more
    (4, 4, 3, 2, 25, [3, 0, 70], 90),
    (2, 2, 20, 1, 80, [5], 100),
]


def random_cache(rows, beams, n_head, head_dim, slots_per_bank, capacity, dtype):
    """What decode_attention reads of a Cache. Rows have any lengths; what lies behind their ends is NaN."""
    entry = torch.randint(capacity - beams + 1, (rows,))
    entry[0], entry[1] = capacity - beams, 0  # a full row, and one without an entry
    state = torch.stack([entry, entry, torch.randint(8, (rows,)), torch.ones(rows, dtype=torch.int64)])
    key, value = torch.randn(2, 2, rows, n_head, capacity, head_dim).to(dtype)
    behind = torch.arange(capacity) >= entry[:, None]  # (rows, capacity)
    for x in (key, value):
        x.masked_fill_(behind[:, None, :, None], torch.nan)
    visible = torch.rand(rows, beams, capacity) < 0.6
    slots = None
    if slots_per_bank is not None:
        bank = torch.arange(len(slots_per_bank)).repeat_interleave(torch.tensor(slots_per_bank)).int()
        slots = Slots(*torch.randn(2, n_head, len(bank), head_dim).to(dtype), bank)
    ids = torch.zeros(rows, beams)
    return SimpleNamespace(key=key, value=value, visible=visible, state=state, ids=ids, layers=[None, slots])


def plain(qkv, cache, B):
    """attend_cached in float64 -> the output; and the first B rows' keys and values as they should be."""
    beams, n_head = cache.ids.size(1), cache.key.size(2)
    slots, out, key, value = cache.layers[1], [], cache.key[1].clone(), cache.value[1].clone()
    q, k, v = qkv.view(B, beams, 3, n_head, -1).transpose(1, 3).unbind(2)  # (B, n_head, beams, head_dim)
    for row in range(B):
        n = int(cache.state[0, row])
        key[row, :, n : n + beams], value[row, :, n : n + beams] = k[row], v[row]
        visible = torch.cat([cache.visible[row, :, :n], torch.eye(beams, dtype=torch.bool)], dim=-1)
        if slots:
            visible = torch.cat([slots.visible_slots(cache.state[2, row]).expand(beams, -1), visible], dim=-1)
        mine = (x[row, None, :, : n + beams].double() for x in (key, value))
        bias = bias_of(visible, torch.float64)[None, None]
        attended = attend_cached(q[row, None].double(), *mine, bias, slots and slots.to(torch.float64))
        out.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(out), key, value


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever the kernel forgets to write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(decode_kernel.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_float64_and_writes_its_own_entries_alone(case, dtype):
    rows, B, beams, n_head, head_dim, slots_per_bank, capacity = case
    cache = random_cache(rows, beams, n_head, head_dim, slots_per_bank, capacity, dtype)
    qkv = torch.randn(B * beams, 3 * n_head * head_dim).to(dtype)
    exact, *expected = plain(qkv, cache, B)
    to = lambda x: x if x is None else Slots(*map(to, vars(x).values())) if isinstance(x, Slots) else x.to(DEVICE)
    there = SimpleNamespace(**{name: list(map(to, x)) if name == "layers" else to(x) for name, x in vars(cache).items()})
    ours = decode_kernel.decode_attention(qkv.to(DEVICE), there, 1).cpu().double()
    assert (ours - exact).norm() <= BOUND[dtype] * exact.norm()
    for side, written in zip((there.key, there.value), expected):
        torch.testing.assert_close(side[1].cpu(), written, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_decode_blocks_are_the_models_blocks(activation, monkeypatch):
    if activation == "gelu_new" and DEVICE == "cpu":
        pytest.skip("torch's product with GELU takes the tanh form on a GPU only")
    config = GPTConfig(10, n_positions=8, n_embd=48, n_layer=3, n_head=3, activation_function=activation)
    model = GPT(config).requires_grad_(False).to(DEVICE)
    for p in model.parameters():
        p.normal_(std=0.3)
    attention = lambda i, qkv: qkv[:, :48] + qkv[:, 48:96] * qkv[:, 96:]
    monkeypatch.setattr(decode_kernel, "decode_attention", lambda qkv, cache, i: attention(i, qkv))
    x = torch.randn(5, 48, device=DEVICE)
    expected = model.blocks(x, attention)
    torch.testing.assert_close(decode_kernel.decode_blocks(model, None, x.clone()), expected, rtol=1e-4, atol=1e-5)
