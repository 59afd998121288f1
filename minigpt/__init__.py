"""A GPT-2 written by hand, with places for learned key/value slots in its attention blocks."""

from minigpt.config import GPTConfig
from minigpt.files import UserError
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

__all__ = ["GPT", "GPTConfig", "Tokenizer", "UserError"]
__version__ = "0.2.0"
