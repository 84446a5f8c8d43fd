"""What PyTorch takes once and keeps, whatever is trained: its threads, its products' buffers, pages of its code."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from barefoot import ops


def warm_up(n_threads: int) -> None:
    """Do on little what a step does: products both ways, attention, norms and gates, the optimizer.

    From then on the kernels work on PyTorch's threads, ``n_threads`` of them.
    """
    torch.set_num_threads(n_threads)
    ops.set_threads(n_threads)
    ops.share_openmp()
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    for dtype in (torch.float32, torch.bfloat16):
        x = F.rms_norm(torch.ones(1, 512, 256), (256,)).to(dtype)
        y = F.silu(x @ weight.to(dtype).T).view(1, 512, 4, 64).transpose(1, 2)
        F.scaled_dot_product_attention(y, y, y, is_causal=True).float().logsumexp(-1).sum().backward()
    optimizer = torch.optim.AdamW([weight], foreach=False, fused=False)
    optimizer.step()
