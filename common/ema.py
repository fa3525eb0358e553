"""Exponential moving average of a model, by foreach operations and without a host sync."""

import copy

import torch
from torch import Tensor, nn


class Ema(nn.Module):
    """A copy of `model` that follows it: e <- decay * e + (1 - decay) * s, buffers included.

    The copy is in eval mode, takes no gradient and is never wrapped by DDP: it is computed from the
    synchronised student, so it is equal on every process. Integer buffers (BatchNorm's counter)
    cannot be averaged and are copied. timm's ModelEmaV3 does the same average without a mask on the
    device, and a step that is dropped for a NaN must not move the teacher either.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True):
        return super().train(False)  # a teacher stays in eval mode, whatever its parent does

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float, applied: Tensor | None = None):
        """One update from `model` (unwrapped). applied: 0-dim tensor, 0. leaves all as it is."""
        ours, theirs = self.module.state_dict(), model.state_dict()
        floats = [k for k, v in ours.items() if v.is_floating_point()]
        e, s = [ours[k] for k in floats], [theirs[k].to(ours[k].dtype) for k in floats]
        others = [k for k, v in ours.items() if not v.is_floating_point()]
        old, new = [ours[k] for k in others], [theirs[k] for k in others]
        if applied is None:
            torch._foreach_lerp_(e, s, 1.0 - decay)
        else:
            # A weight of the device makes one lerp per tensor; to blend by foreach and then choose
            # with the mask would read and write three times as much, and need a third copy.
            weight, moves = (1.0 - decay) * applied, applied > 0
            torch._foreach_lerp_(e, s, [weight.to(t.dtype) for t in e])
            new = [torch.where(moves, n, o) for n, o in zip(new, old)]
        if old:
            torch._foreach_copy_(old, new)
