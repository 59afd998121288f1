"""GPT-2 (Radford et al. 2019), written out, with a place in every attention block for learned slots.

    ids -> wte + wpe -> [ h.0 ... h.n ] -> ln_f -> @ wte.T -> logits

    one block:   x = x + attn(ln_1(x))            attn: c_attn -> attend to text and slots -> c_proj
                 x = x + mlp(ln_2(x))             mlp:  c_fc -> GELU -> c_proj

Inside, a batch is one row of N tokens (attention.py), so activations are (N, n_embd). Modules and parameters have the
names of the published checkpoints: h.0.attn.c_attn.weight and so on.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from minigpt import checkpoint
from minigpt.attention import PackedBatch, slot_layers
from minigpt.backends import attend
from minigpt.config import ACTIVATIONS, GPTConfig
from minigpt.files import UserError
from minigpt.loss import project


class Conv1D(nn.Module):
    """x @ weight + bias. OpenAI's name, no convolution: a Linear whose weight is (in, out)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Embedding(nn.Module):
    """Row i of weight for id i. Unlike nn.Embedding it draws no random weights first."""

    def __init__(self, n, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, n_embd))

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def logits(self, hidden):
        """(N, n_embd) -> (N, n) in float32 or better: the head is the embedding itself, used backwards."""
        logits = project(hidden, self.weight)[:, : len(self.weight)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x, attn_fn):
        """attn_fn: attention to text and slots (backends.attend), or to a cache (cache.py)."""
        return self.c_proj(attn_fn(self.c_attn(x)))  # (N, C) -> (N, 3C) -> (N, C) -> (N, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.mlp_dim)
        self.c_proj = Conv1D(config.mlp_dim, config.n_embd)
        self.activate = ACTIVATIONS[config.activation_function]

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
        x = x + self.attn(self.ln_1(x), attn_fn)  # (N, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = "auto"  # or "fused", "plain": see backends.attend
        self.checkpoint_activations = False  # True: keep each block's input only, compute the rest again in backward
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
        return self.logits(self.hidden(ids.flatten(), packed).view(B, T, -1))

    def hidden(self, ids, packed, slots=None, position_offset=0):
        """ids (N,), a PackedBatch of them -> the last layer's normed activations (N, n_embd).

        slots: Slots of the banks that packed.bank_mask opens. position_offset: of each sequence's first token."""
        n_positions, limit = packed.longest + position_offset, self.config.n_positions
        if n_positions > limit:
            raise UserError(f"{n_positions} positions are more than this model's context of {limit}")
        layers = slot_layers(slots, self.config.n_layer)

        def attn_fn(i, qkv):
            return attend(qkv, self.config.n_head, packed, layers[i], self.attention)

        return self.blocks(self.embed(ids, packed.position + position_offset), attn_fn)

    def embed(self, ids, position):
        """ids (N,), position (N,) -> (N, n_embd)."""
        return self.wte(ids) + self.wpe(position)

    def blocks(self, x, attn_fn):
        """x (N, n_embd) through all blocks and the last norm. attn_fn(i, qkv): layer i's attention, (N, 3C) -> (N, C)."""
        for i, block in enumerate(self.h):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint_block(block, x, partial(attn_fn, i), use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, partial(attn_fn, i))
        return self.ln_f(x)

    def logits(self, hidden):
        """hidden (..., n_embd) -> (..., vocab_size), float32 or better."""
        return self.wte.logits(hidden.reshape(-1, hidden.size(-1))).view(*hidden.shape[:-1], -1)
