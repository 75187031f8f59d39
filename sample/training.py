"""What both trainings share: the order of an epoch, the optimizer, the schedule, the average."""

import math

import torch
from torch import Tensor, nn


def epoch_order(is_star: Tensor, most_stars: int) -> Tensor:
    """Shuffles all pictures, but of the near-identical generated stars lets only some in."""
    stars = is_star.nonzero().flatten()
    stars = stars[torch.randperm(len(stars))[:most_stars]]
    order = torch.cat([(~is_star).nonzero().flatten(), stars])
    return order[torch.randperm(len(order))]


def make_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and filters only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)


def warm_cosine(step: int, steps: int) -> float:
    """The share of the learning rate at `step`: 5 % linear warm-up, then a half cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves parameters and running statistics of `average` towards `model`."""
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for slow, fast in pairs:
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)
