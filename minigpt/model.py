"""GPT-2 (Radford et al. 2019), written out, with a place in every attention block for learned slots.

    ids -> wte + wpe -> [ h.0 ... h.n ] -> ln_f -> @ wte.T -> logits

    one block:   x = x + attn(ln_1(x))            attn: c_attn -> attend to text and slots -> c_proj
                 x = x + mlp(ln_2(x))             mlp:  c_fc -> GELU -> c_proj

Inside, a batch is a row of N tokens (see attention.py), so a tensor of activations is (N, n_embd).
Modules and parameters have the names of the published checkpoints: h.0.attn.c_attn.weight and so on.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from minigpt import checkpoint
from minigpt.attention import PackedBatch, attend
from minigpt.config import ACTIVATIONS, GPTConfig
from minigpt.errors import UserError

ACTIVATE = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Conv1D(nn.Module):
    """x @ weight + bias. GPT-2 stores its weights (in, out), the other way round from nn.Linear."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Embedding(nn.Module):
    """Row i of weight for id i. (nn.Embedding draws random weights first, and even on the meta device that takes
    torch a second or two of imports.)"""

    def __init__(self, n, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, n_embd))

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def logits(self, hidden):
        """(..., n_embd) -> (..., n): the head is the embedding itself, used backwards."""
        return hidden @ self.weight.T


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.mlp_dim)
        self.c_proj = Conv1D(config.mlp_dim, config.n_embd)
        self.activate = ACTIVATE[ACTIVATIONS[config.activation_function]]

    def forward(self, x):
        return self.c_proj(self.activate(self.c_fc(x)))  # (N, C) -> (N, 4C) -> (N, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, attn_fn):
        """x (N, C) -> (N, C). look: the attention of this layer, qkv (N, 3C) -> (N, C)."""
        x = x + self.attn.c_proj(attn_fn(self.attn.c_attn(self.ln_1(x))))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = "auto"  # or "fused", "plain": see attention.attend
        self.checkpoint_activations = (
            False  # True: keep only each block's input and compute the rest again for backward
        )
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """The checkpoint called `name` (a directory, "demo" or a published name), frozen, on `device` in `dtype`."""
        directory = checkpoint.find(name)
        if not (directory / "config.json").exists():
            raise UserError(f"{directory}: no checkpoint: there is no config.json in it")
        config = GPTConfig.from_file(directory / "config.json")
        checkpoint.check_size(config, directory)
        with torch.device("meta"):  # shapes only: memory is taken once, in the dtype that is asked for
            model = cls(config)
        checkpoint.load_weights(model, directory, device, dtype)
        return model.requires_grad_(False).eval()

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def dtype(self):
        return self.ln_f.weight.dtype

    def forward(self, ids):
        """Plain GPT-2: ids (B, T) int64 -> logits (B, T, vocab_size)."""
        B, T = ids.shape
        packed = PackedBatch([T] * B, device=ids.device)
        return self.logits(self.hidden(ids.flatten(), packed)).view(B, T, -1)

    def hidden(self, ids, packed, slots=None, position_offset=0):
        """ids (N,), packed as `layout` says -> the last layer's normed activations (N, n_embd).

        slots: the banks that layout.opened speaks of. position_offset: the position of each
        sentence's first token. Raises UserError for a sentence that is longer than the context."""

        def attn_fn(i, qkv):
            return attend(qkv, self.config.n_head, packed, slots and slots.layer(i), self.attention)

        if packed.longest + position_offset > self.config.n_positions:
            limit = self.config.n_positions
            raise UserError(
                f"{packed.longest + position_offset} positions are more than this model's context of {limit}"
            )
        return self.blocks(self.embed(ids, packed.position + position_offset), attn_fn)

    def embed(self, ids, position):
        """ids (N,), position (N,) -> (N, n_embd)."""
        return self.wte(ids) + self.wpe(position)

    def blocks(self, x, attn_fn):
        """x (N, n_embd) through all blocks and the last norm. look(i, qkv) is the attention of layer i:
        qkv (N, 3 * n_embd) -> (N, n_embd); decoding with a cache brings its own."""
        for i, block in enumerate(self.h):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint_block(block, x, partial(attn_fn, i), use_reentrant=False)
            else:
                x = block(x, partial(attn_fn, i))
        return self.ln_f(x)

    def logits(self, hidden):
        """hidden (..., n_embd) -> (..., vocab_size)."""
        return self.wte.logits(hidden)
