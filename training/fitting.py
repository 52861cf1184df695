"""The training loop that all recipes share: seeded stages, each kept so that a run can go on."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

EMA_DECAY = 0.998
IGNORE = -100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Stage:
    """Length and peak learning rate of one stage; `tower_rate` where the tower has its own."""

    steps: int
    batch_size: int
    rate: float
    tower_rate: float | None = None


def fit(
    name: str,
    stage: Stage,
    groups: list[dict[str, Any]],
    items: Iterable[Item],
    loss_of: Callable[[Item], torch.Tensor],
    save: Callable[[], object] | None = None,
) -> None:
    """AdamW, short warm-up, cosine decay, bfloat16 forward; leaves the moving average."""
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(stage.steps))
    average = [weight.detach().clone() for weight in weights]
    began, total = time.monotonic(), 0.0
    for step, item in enumerate(items, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(item)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - EMA_DECAY)
        total += loss.item()
        if step % 100 == 0:
            rate = step * stage.batch_size / (time.monotonic() - began)
            print(f"{name} {step}/{stage.steps} loss {total / 100:.4f} {rate:.0f}/s", flush=True)
            total = 0.0
        if save is not None and step % 500 == 0:
            _swap(weights, average)
            save()
            _swap(weights, average)
    _swap(weights, average)
    print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def _swap(weights: list[nn.Parameter], average: list[torch.Tensor]) -> None:
    for weight, mean in zip(weights, average, strict=True):
        kept = weight.detach().clone()
        weight.data.copy_(mean)
        mean.copy_(kept)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """[B,H,W,3] uint8 -> [B,3,H,W] float32 in [-1,1], as SigLIP's processor does."""
    return ((images.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy [B,S,V], [B,S] → []; labels of IGNORE count nothing."""
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def take_up(module: nn.Module, path: Path, seed: int, run: Callable[[], None]) -> None:
    """Train a module by `run`, or take up its saved result."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return
    torch.manual_seed(seed)
    run()
    torch.save(module.state_dict(), path)


def _schedule(steps: int) -> Callable[[int], float]:
    warm = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warm) * max(decay, 0.01)

    return factor
