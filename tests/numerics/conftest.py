"""What the cases of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention's mathematics; what it compiles to is for a GPU."""
    from torch.nn.attention import flex_attention

    from dist_cpt.model import attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
