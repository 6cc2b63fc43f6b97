import contextlib
import math

import torch
from torch import nn

# --- begin of the Optimizer section ---------------------------------------------------------------
# AdamW for all parameters (Loshchilov and Hutter 2019, arXiv:1711.05101). HIDDEN_LR is a first
# choice, and not tuned; the other values are those of the Muon baseline.

NUM_STEPS = {"speedrun": 4950, "proxy": 1525, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly to 0
ADAM_BETAS, ADAM_EPS, ADAM_WEIGHT_DECAY = (0.8, 0.95), 1e-10, 0.001
HIDDEN_LR, EMBEDDING_LR, HEAD_LR, VECTOR_LR = 0.002, 0.7, 0.004, 0.015


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
            lr = HIDDEN_LR if name.startswith("blocks.") and param.ndim == 2 else VECTOR_LR
            self.rules.append(AdamW(param, lrs.get(name, lr)))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters; step counts from 0."""
        lr_factor = min(1.0, (self.num_steps - step) / (COOLDOWN * self.num_steps))
        for rule in self.rules:
            rule.step(step, lr_factor)

    def validation_weights(self) -> contextlib.AbstractContextManager:
        """Inside this context the model has the weights to validate: here the current ones."""
        return contextlib.nullcontext()
