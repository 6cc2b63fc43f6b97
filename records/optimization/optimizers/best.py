import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# --- begin of the Optimizer section ---------------------------------------------------------------
# What climbed on the track, put together: SOAP-Muon, tail average, row floor, cautious decay.
#
# SOAP-Muon: the direction of SOAP (Vyas et al. 2024, arXiv:2409.11321), made orthogonal like Muon's
# (Jordan et al. 2024). Row floor: no row of it is shorter than a share of their root mean square.
# Cautious decay: only weights that the update makes smaller decay (Chen et al. 2025,
# arXiv:2510.12402). Tail average: as in muon_tail_average.py. AdamW, with cautious decay, for all
# that is no matrix of a block. Two of these, SOAP-Muon and the row floor, are known to us by name
# alone, and the definitions here are our own. All values are those of the Muon baseline or first
# choices; none is tuned.

NUM_STEPS = {"speedrun": 2690, "proxy": 925, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly
LR_FLOOR = 0.1  # what they end at, as a share of their start: the average does the rest
TAIL = 0.2  # share of the steps, the last ones, over which the weights are averaged
TAIL_HORIZON = 0.03  # share of the steps that the exponential average looks back
MUON_LR, MUON_WEIGHT_DECAY = 0.025, 0.1  # decay on about half of the weights at a time
ROW_FLOOR = 0.5
SOAP_BETA, SOAP_EPS = 0.95, 1e-8  # of all running means
SOAP_REFRESH = 10  # steps between two updates of the eigenvectors
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


def decay_and_step_(param: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """param -= update, in place. The entries that this moves towards 0 decay besides."""
    weight = param.float()
    towards_0 = update * weight > 0
    param.copy_(weight - lr * weight_decay * weight * towards_0 - update)


class Eigenbasis:
    """Eigenvectors, as columns, of the running mean of the products that are added."""

    def __init__(self, param: nn.Parameter, size: int):
        self.mean = torch.zeros(size, size, device=param.device)
        self.vectors = torch.eye(size, device=param.device)

    def add(self, product: Tensor, step: int) -> None:
        """product: (size, size), symmetric. Every SOAP_REFRESH steps the vectors follow, twice from
        scratch (many gradients of the first step are 0), then by a step of orthogonal iteration."""
        self.mean.lerp_(product, 1 - SOAP_BETA)
        if step in (0, SOAP_REFRESH):
            self.vectors = torch.linalg.eigh(self.mean).eigenvectors.flip(1)  # the largest first
        elif step % SOAP_REFRESH == 0:
            self.vectors = torch.linalg.qr(self.mean @ self.vectors).Q


class SoapMuon:
    """SOAP's direction, orthogonalised, without rows that hardly move, for one matrix."""

    def __init__(self, param: nn.Parameter):
        self.param, self.mean = param, torch.zeros_like(param)
        self.mean_square = torch.zeros_like(param)  # in the eigenbases
        self.left, self.right = (Eigenbasis(param, size) for size in param.shape)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * MUON_LR, self.param.grad
        self.left.add(grad @ grad.mT, step)
        self.right.add(grad.mT @ grad, step)
        if step == 0:  # this gradient is diagonal in its own eigenbases: all else would be rounding
            return
        self.mean.lerp_(grad, 1 - SOAP_BETA)
        left, right = self.left.vectors, self.right.vectors
        self.mean_square.lerp_((left.mT @ grad @ right).square(), 1 - SOAP_BETA)

        nesterov = left.mT @ grad.lerp(self.mean, SOAP_BETA) @ right
        update = left @ (nesterov / (self.mean_square.sqrt() + SOAP_EPS)) @ right.mT
        update = orthogonalize(update)  # whatever its scale is
        norms = update.norm(dim=1, keepdim=True)  # of the rows
        floor = ROW_FLOOR * norms.square().mean().sqrt()
        update = update * (norms.clamp_min(floor) / (norms + SOAP_EPS))

        rows, columns = update.shape
        scale = lr * math.sqrt(max(1, rows / columns))
        decay_and_step_(self.param, scale * update, lr, MUON_WEIGHT_DECAY)


class AdamW:
    """AdamW with cautious decay for one parameter, in fp32 whatever its dtype is."""

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
        update = lr * mean / (mean_square.sqrt() + ADAM_EPS)
        decay_and_step_(self.param, update, lr, ADAM_WEIGHT_DECAY)


class Optimizer:
    def __init__(self, model: nn.Module, num_steps: int):
        lrs = {"embedding.weight": EMBEDDING_LR, "head.weight": HEAD_LR}
        self.params, self.num_steps, self.rules = list(model.parameters()), num_steps, []
        self.averages: list[Tensor] = []  # of the weights, fp32; none before the tail
        for name, param in model.named_parameters():
            is_hidden = name.startswith("blocks.") and param.ndim == 2
            adam_lr = lrs.get(name, VECTOR_LR)
            self.rules.append(SoapMuon(param) if is_hidden else AdamW(param, adam_lr))

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
