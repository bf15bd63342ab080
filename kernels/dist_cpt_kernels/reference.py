"""What each operation means, in plain torch and without a thought for speed or memory.

T tokens, D model, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale * loss_sum, loss_sum detached), loss_sum = sum over kept tokens of logsumexp(z) - z[label].

    z = hidden @ weight.T in the inputs' common dtype, everything after it in at least fp32. Differentiable
    by autograd; materialises the full logits [T, V].
    """
    logits_TV = hidden_TD @ weight_VD.to(hidden_TD.dtype).T
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    return loss_sum * scale, loss_sum.detach()
