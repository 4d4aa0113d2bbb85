"""The operations of exchanges, and how messages name a call."""

from __future__ import annotations

# The index of an operation stands for it in headers and reports.
OPERATIONS = ("", "forward", "backward", "plan", "planned forward")
_EARLIER = {"backward": "of the forward", "planned forward": "with the plan"}


def call_text(operation: int, layer: int, forward_epoch: int) -> str:
    """A call by its header's fields."""
    name = OPERATIONS[operation]
    text = f"{name} of layer {layer}"
    return text + (f" ({_EARLIER[name]} of epoch {forward_epoch})" if forward_epoch else "")
