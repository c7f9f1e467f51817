"""What control does to a model's responses: metrics, and step sizes that are comparable."""

from .metrics import diversity, kl_divergence
from .strength import match_kl

__all__ = ["diversity", "kl_divergence", "match_kl"]
