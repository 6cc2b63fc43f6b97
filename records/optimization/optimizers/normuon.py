import contextlib
import math

import torch
from torch import Tensor, nn

# --- begin of the Optimizer section ---------------------------------------------------------------
# NorMuon for the matrices of the blocks (Li et al. 2025, arXiv:2510.05491), which is Muon with a
# second moment for each neuron, AdamW for all else (Loshchilov and Hutter 2019, arXiv:1711.05101).
# The values are those of the Muon baseline; NORMUON_BETA is a first choice, and not tuned.

NUM_STEPS = {"speedrun": 3250, "proxy": 1000, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly to 0
MUON_LR, MUON_MOMENTUM, MUON_WEIGHT_DECAY = 0.025, 0.95, 0.05
NORMUON_BETA = 0.95  # of the running mean squares
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


class NorMuon:
    """Muon whose update is brought to one scale in every row, or column of a wide matrix."""

    def __init__(self, param: nn.Parameter):
        rows, columns = param.shape
        self.param, self.momentum = param, torch.zeros_like(param)
        self.dim = 1 if rows >= columns else 0  # the shorter side, over which squares are averaged
        self.mean_square = torch.zeros_like(param.mean(self.dim, keepdim=True))

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * MUON_LR, self.param.grad
        self.momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        update = orthogonalize(grad.lerp(self.momentum, MUON_MOMENTUM))
        self.mean_square.lerp_(update.square().mean(self.dim, keepdim=True), 1 - NORMUON_BETA)
        scaled = update * (self.mean_square + 1e-10).rsqrt()
        update = scaled * (update.norm() / (scaled.norm() + 1e-10))  # the norm of before
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
        self.num_steps, self.rules = num_steps, []
        for name, param in model.named_parameters():
            is_hidden = name.startswith("blocks.") and param.ndim == 2
            self.rules.append(
                NorMuon(param) if is_hidden else AdamW(param, lrs.get(name, VECTOR_LR))
            )

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters; step counts from 0."""
        lr_factor = min(1.0, (self.num_steps - step) / (COOLDOWN * self.num_steps))
        for rule in self.rules:
            rule.step(step, lr_factor)

    def validation_weights(self) -> contextlib.AbstractContextManager:
        """Inside this context the model has the weights to validate: here the current ones."""
        return contextlib.nullcontext()
