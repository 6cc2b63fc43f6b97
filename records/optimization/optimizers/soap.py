import contextlib
import math

import torch
from torch import Tensor, nn

# --- begin of the Optimizer section ---------------------------------------------------------------
# SOAP for the matrices of the blocks (Vyas et al. 2024, arXiv:2409.11321, algorithm 3), AdamW for
# all else (Loshchilov and Hutter 2019, arXiv:1711.05101). SOAP's values are first choices near the
# paper's, and not tuned; the others are those of the Muon baseline.

NUM_STEPS = {"speedrun": 2750, "proxy": 850, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly to 0
SOAP_LR, SOAP_WEIGHT_DECAY = 0.002, 0.1
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


class Soap:
    """Adam in the eigenbases of Shampoo's two preconditioners, for one matrix."""

    def __init__(self, param: nn.Parameter):
        self.param, self.mean = param, torch.zeros_like(param)
        self.mean_square = torch.zeros_like(param)  # in the eigenbases
        self.left, self.right = (Eigenbasis(param, size) for size in param.shape)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * SOAP_LR, self.param.grad
        self.left.add(grad @ grad.mT, step)
        self.right.add(grad.mT @ grad, step)
        if step == 0:  # this gradient is diagonal in its own eigenbases: all else would be rounding
            return
        self.mean.lerp_(grad, 1 - SOAP_BETA)
        left, right = self.left.vectors, self.right.vectors
        self.mean_square.lerp_((left.mT @ grad @ right).square(), 1 - SOAP_BETA)
        bias = 1 - SOAP_BETA**step  # of both running means
        mean, mean_square = left.mT @ self.mean @ right / bias, self.mean_square / bias
        update = left @ (mean / (mean_square.sqrt() + SOAP_EPS)) @ right.mT
        self.param.mul_(1 - lr * SOAP_WEIGHT_DECAY).sub_(lr * update)


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
            self.rules.append(Soap(param) if is_hidden else AdamW(param, lrs.get(name, VECTOR_LR)))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters; step counts from 0."""
        lr_factor = min(1.0, (self.num_steps - step) / (COOLDOWN * self.num_steps))
        for rule in self.rules:
            rule.step(step, lr_factor)

    def validation_weights(self) -> contextlib.AbstractContextManager:
        """Inside this context the model has the weights to validate: here the current ones."""
        return contextlib.nullcontext()
