"""The shape of a GPT-2: read from a checkpoint's config.json, or one of the published ones.

A setting that changes the function and is not implemented is refused by name, so a checkpoint either gives the logits
that transformers gives or does not load. Settings that do not change it are passed over.
"""

from dataclasses import asdict, dataclass

import torch.nn.functional as F

from minigpt.files import UserError, read_object


def gelu_tanh(x):
    """What GPT-2 was trained with: an approximation of GELU. The exact form would give other logits."""
    return F.gelu(x, approximate="tanh")


# By transformers' names.
ACTIVATIONS = dict.fromkeys(["gelu_new", "gelu_pytorch_tanh", "gelu_fast"], gelu_tanh)
ACTIVATIONS |= {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}
# transformers' other names of the same settings.
ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
# Settings that would change the function, with the values that do not. auto_map brings code of its own.
ONLY = {
    "model_type": ["gpt2"],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "quantization_config": [None],
    "pruned_heads": [None, {}],
    "auto_map": [None, {}],
}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2 (Radford et al. 2019, section 2.3). The defaults are those of `gpt2`, 124 M parameters."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = self.mlp_dim if name == "n_inner" else getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise UserError(f"{name} must be a whole number from 1 on, not {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if str(self.activation_function) not in ACTIVATIONS:
            raise UserError(f"activation_function {self.activation_function!r} is none of {', '.join(ACTIVATIONS)}")
        if type(self.layer_norm_epsilon) is not float:
            raise UserError(f"layer_norm_epsilon must be a number, not {self.layer_norm_epsilon!r}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self):
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @classmethod
    def from_dict(cls, settings):
        """The content of a config.json, by GPT-2's names or transformers' -> GPTConfig. Raises UserError."""
        for name, values in ONLY.items():
            if name in settings and settings[name] not in values:
                raise UserError(f"{name} = {settings[name]!r} is not implemented: only {values[0]!r} is")
        sizes = {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}
        for alias, name in ALIASES.items():
            if alias in settings and sizes.setdefault(name, settings[alias]) != settings[alias]:
                raise UserError(f"{name} is {sizes[name]!r} but {alias}, its other name, is {settings[alias]!r}")
        return cls(**sizes)

    @classmethod
    def from_file(cls, path):
        """Read config.json. Raises UserError naming the file if it is not a GPT-2's."""
        settings = read_object(path)
        try:
            return cls.from_dict(settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_dict(self):
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self)}


PUBLISHED = {
    "distilgpt2": GPTConfig(n_layer=6),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
