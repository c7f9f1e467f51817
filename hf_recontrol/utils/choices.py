"""The names that configurations and settings choose from."""

CONTROL_METHODS = ("ascent", "advantage", "static")
HOOK_POINTS = ("decoder_layer", "lm_head")
ACTIVATIONS = ("relu", "silu", "gelu", "tanh")
