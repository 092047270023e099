"""The cross entropy of the output head without all the logits at once.

Its plain twin is in GPT.forward in model.py: the logits, then F.cross_entropy.
"""

import math

import torch
import torch.nn.functional as F


def head_loss(x, weight, targets, V):
    """The mean cross entropy of the logits x @ weight.T, a scalar in nats.

    x: (B, T, C); weight: (V + padding, C), of which the first V rows are tokens; targets: (B, T)
    int64, -1 = not scored.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if x.dtype == torch.float32 and x.requires_grad and not plain:
        return HeadLoss.apply(x, weight, targets, V)
    logits = F.linear(x, weight)[:, :V]  # (B * T, V)
    return F.cross_entropy(logits.float(), targets, ignore_index=-1)


class HeadLoss(torch.autograd.Function):
    """The same, 512 rows of logits at a time, and the gradient is computed along the way.

    All logits at once take more memory than everything else, and allocating it takes time. A model
    that is compiled or in bfloat16 computes them at once anyway: there it was faster (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, V):
        rows, n, loss = min(512, len(x)), (targets >= 0).sum(), x.new_zeros(())
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        buffers = x.new_empty(2, rows, len(weight))
        for first in range(0, len(x), rows):
            part, y = x[first : first + rows], targets[first : first + rows, None]  # (rows, 1)
            logits, p = buffers[:, : len(y)]  # (rows, V + padding) each
            torch.mm(part, weight.T, out=logits)
            logits[:, V:] = -math.inf
            torch.log_softmax(logits, -1, out=p)
            share, y = (y >= 0) / n, y.clamp(min=0)  # (rows, 1)
            loss -= (p.gather(1, y) * share).sum()
            p.exp_().scatter_add_(1, y, -torch.ones_like(share))  # d loss / d logits / share
            dx[first : first + rows] = p @ weight * share
            dweight.addmm_(p.T, part * share)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = (d if grad == 1 else d * grad for d in ctx.saved_tensors)
        return dx, dweight, None, None
