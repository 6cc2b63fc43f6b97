import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# --- begin of the Optimizer section ---------------------------------------------------------------
# Muon and AdamW as in the baseline (Jordan et al. 2024; Loshchilov and Hutter 2019), validated with
# an exponential average of the weights over the last steps (Polyak and Juditsky 1992; Izmailov et
# al. 2018, arXiv:1803.05407). The values of the average are first choices, and not tuned; the
# others are those of the baseline.

NUM_STEPS = {"speedrun": 3100, "proxy": 950, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly
LR_FLOOR = 0.1  # what they end at, as a share of their start: the average does the rest
TAIL = 0.2  # share of the steps, the last ones, over which the weights are averaged
TAIL_HORIZON = 0.03  # share of the steps that the exponential average looks back
MUON_LR, MUON_MOMENTUM, MUON_WEIGHT_DECAY = 0.025, 0.95, 0.05
ADAM_BETAS, ADAM_EPS, ADAM_WEIGHT_DECAY = (0.8, 0.95), 1e-10, 0.001
EMBEDDING_LR, HEAD_LR, VECTOR_LR = 0.7, 0.004, 0.015  # AdamW


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """The weights before the first step. torch's generator already has the seed of the run."""
    stds = {"embedding.weight": 1.0, "head.weight": 0.005}
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.fill_(1)
        elif name.endswith((".bias", ".out.weight", ".down.weight")):
            param.zero_()  # so that a block starts as the identity
        else:  # embedding, head, q, k, v, up
            param.normal_(std=stds.get(name, 0.5 / math.sqrt(param.size(1))))


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix: U Vᵀ where x = U S Vᵀ.

    Twelve Newton-Schulz steps take every singular value s to 2s - 1.5s³ + 0.5s⁵, which doubles a
    small one and has a fixed point of zero slope at 1.
    """
    y = x / (x.norm() + 1e-7)  # no singular value above 1
    y = y.bfloat16() if y.is_cuda else y
    y = y.mT if x.size(0) > x.size(1) else y  # the smaller side first
    for _ in range(12):
        a = y @ y.mT
        y = 2 * y + (0.5 * a @ a - 1.5 * a) @ y
    return (y.mT if x.size(0) > x.size(1) else y).type_as(x)


class Muon:
    """Nesterov momentum, orthogonalised, for one matrix."""

    def __init__(self, param: nn.Parameter):
        self.param, self.momentum = param, torch.zeros_like(param)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * MUON_LR, self.param.grad
        self.momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        update = orthogonalize(grad.lerp(self.momentum, MUON_MOMENTUM))
        rows, columns = update.shape
        self.param.mul_(1 - lr * MUON_WEIGHT_DECAY)
        self.param.sub_(lr * math.sqrt(max(1, rows / columns)) * update)


class AdamW:
    """AdamW for one parameter, in fp32 whatever its dtype is."""

    def __init__(self, param: nn.Parameter, lr: float):
        self.param, self.lr = param, lr
        self.mean = torch.zeros_like(param, dtype=torch.float32)
        self.mean_square = torch.zeros_like(self.mean)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * self.lr, self.param.grad.float()
        self.mean.lerp_(grad, 1 - ADAM_BETAS[0])
        self.mean_square.lerp_(grad.square(), 1 - ADAM_BETAS[1])
        mean = self.mean / (1 - ADAM_BETAS[0] ** (step + 1))
        mean_square = self.mean_square / (1 - ADAM_BETAS[1] ** (step + 1))
        decayed = (1 - lr * ADAM_WEIGHT_DECAY) * self.param.float()
        self.param.copy_(decayed - lr * mean / (mean_square.sqrt() + ADAM_EPS))


class Optimizer:
    def __init__(self, model: nn.Module, num_steps: int):
        lrs = {"embedding.weight": EMBEDDING_LR, "head.weight": HEAD_LR}
        self.params, self.num_steps, self.rules = list(model.parameters()), num_steps, []
        self.averages: list[Tensor] = []  # of the weights, fp32; none before the tail
        for name, param in model.named_parameters():
            is_hidden = name.startswith("blocks.") and param.ndim == 2
            self.rules.append(Muon(param) if is_hidden else AdamW(param, lrs.get(name, VECTOR_LR)))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters, and in the tail their averages; step counts from 0."""
        left = (self.num_steps - step) / self.num_steps  # share of the steps
        lr_factor = min(1.0, LR_FLOOR + (1 - LR_FLOOR) * left / COOLDOWN)
        for rule in self.rules:
            rule.step(step, lr_factor)
        if left <= TAIL:
            if not self.averages:
                self.averages = [param.float().clone() for param in self.params]
            for average, param in zip(self.averages, self.params):
                average.lerp_(param.float(), min(1.0, 1 / (TAIL_HORIZON * self.num_steps)))

    @contextlib.contextmanager
    def validation_weights(self) -> Iterator[None]:
        """Inside this context the model has the weights to validate: the averages in the tail."""
        current = [param.detach().clone() for param in self.params]
        self.load(self.averages or current)
        yield
        self.load(current)

    @torch.no_grad()
    def load(self, weights: list[Tensor]) -> None:
        for param, weight in zip(self.params, weights):
            param.copy_(weight)
