"""Prefix-tuning on top of minigpt: banks of slots, data, training, the k-shot baseline, metrics."""

from prefix.banks import Banks

__all__ = ["Banks"]
