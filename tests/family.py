"""The family of layers over which the laws are stated: every layer and container, with every option."""

import functools

import numpy as np
import torch
from torch import nn

from ssmkit import (
    LRU,
    S4,
    S4D,
    S5,
    S6,
    Checkpoint,
    Concatenate,
    ForwardLayer,
    LearnedStart,
    Mamba,
    Mamba2,
    MultiRate,
    Pointwise,
    Product,
    Residual,
    S4Block,
    Sequential,
    ShortConv,
    TiedDropout,
    hippo,
    layers,
    systems,
)


def _decay(N):
    """A user's own matrix: dissipative, with a low-rank part that is not known in closed form."""
    rng = np.random.default_rng(0)
    S, p = rng.standard_normal((N, N)), rng.standard_normal((N, 2))
    return (S - S.T) - 0.3 * np.eye(N) - p @ p.T, np.ones(N)


def _ring(N):
    """A user's own poles."""
    return -0.2 + 1j * np.arange(1, N // 2 + 1), np.ones(N // 2, dtype=complex)


class RootMeanSquare(nn.Module):
    """A user's own position-wise module."""

    def forward(self, u):
        return u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt()


class Grid(ForwardLayer):
    """A user's own layer over two axes: a bidirectional system along each."""

    def __init__(self, d_model):
        super().__init__()
        self.d_input = self.d_output = d_model
        self.along = nn.ModuleList(S4D(d_model, 4, bidirectional=True) for _ in range(2))

    def system(self, rate=1.0):
        return tuple(layer.system(rate) for layer in self.along)

    def forward(self, u, system=None):
        down, across = self.system() if system is None else system
        return self.along[1](self.along[0](u.transpose(-3, -2), down).transpose(-3, -2), across)


SSM = {
    "S4": lambda: S4(3, 8),
    "S4, N=2": lambda: S4(2, 2),
    "S4, N=64": lambda: S4(2),
    "S4, legt": lambda: S4(3, 8, init="legt"),
    "S4, lagt": lambda: S4(3, 8, init="lagt"),
    "S4, fout": lambda: S4(3, 8, init="fout"),
    "S4, callable": lambda: S4(3, 8, init=hippo.legs),
    "S4, own matrix": lambda: S4(3, 8, init=_decay),
    "S4, rank 2": lambda: S4(3, 8, rank=2),
    "S4, rank 3 of legt": lambda: S4(3, 8, init="legt", rank=3),
    "S4, tied, own dt": lambda: S4(6, 8, n_ssm=2),
    "S4, tied, tied dt": lambda: S4(6, 8, n_ssm=2, tie_dt=True),
    "S4, fully tied": lambda: S4(4, 8, n_ssm=1, tie_dt=True),
    "S4, channels": lambda: S4(3, 8, channels=2),
    "S4, tied channels": lambda: S4(6, 8, channels=3, n_ssm=2, tie_dt=True),
    "S4, slow": lambda: S4(3, 16, dt_min=1e-5, dt_max=2e-5),
    "S4, slow fout": lambda: S4(3, 16, init="fout", dt_min=1e-5, dt_max=2e-5),
    "S4, fast": lambda: S4(3, 16, dt_min=0.1, dt_max=10.0),
    "S4, dropout": lambda: S4(3, 8, dropout=0.5),
    "S4, wide": lambda: S4(48, 4, init="legt"),
    "S4D": lambda: S4D(3, 8),
    "S4D, N=2": lambda: S4D(2, 2),
    "S4D, N=64": lambda: S4D(2),
    "S4D, bilinear": lambda: S4D(3, 8, discretization="bilinear"),
    "S4D, callable rule": lambda: S4D(3, 8, discretization=systems.bilinear),
    "S4D, lin": lambda: S4D(3, 8, init="lin"),
    "S4D, inv": lambda: S4D(3, 8, init="inv"),
    "S4D, quad": lambda: S4D(3, 8, init="quad"),
    "S4D, real": lambda: S4D(3, 8, init="real"),
    "S4D, legt": lambda: S4D(3, 8, init="legt"),
    "S4D, lagt": lambda: S4D(3, 8, init="lagt"),
    "S4D, fout": lambda: S4D(3, 8, init="fout"),
    "S4D, own poles": lambda: S4D(3, 8, init=_ring),
    "S4D, own matrix": lambda: S4D(3, 8, init=_decay),
    "S4D, tied, own dt": lambda: S4D(6, 8, n_ssm=2),
    "S4D, tied, tied dt": lambda: S4D(6, 8, n_ssm=2, tie_dt=True),
    "S4D, fully tied": lambda: S4D(4, 8, n_ssm=1, tie_dt=True),
    "S4D, channels": lambda: S4D(3, 8, channels=2),
    "S4D, tied channels": lambda: S4D(6, 8, channels=3, n_ssm=2, tie_dt=True),
    "S4D, slow": lambda: S4D(3, 16, dt_min=1e-5, dt_max=2e-5),
    "S4D, slow bilinear": lambda: S4D(3, 16, discretization="bilinear", dt_min=1e-5, dt_max=2e-5),
    "S4D, fast": lambda: S4D(3, 16, dt_min=0.1, dt_max=10.0),
    "S4D, dropout": lambda: S4D(3, 8, dropout=0.5),
    "S4D, wide channels": lambda: S4D(53, 4, channels=2),
}

SHARED = {
    "S5": lambda: S5(3, 8),
    "S5, N=2": lambda: S5(3, 2),
    "S5, N=64": lambda: S5(2),
    "S5, blocks": lambda: S5(3, 12, blocks=3),
    "S5, bilinear": lambda: S5(3, 8, discretization="bilinear"),
    "S5, callable rule": lambda: S5(3, 8, discretization=systems.zoh),
    "S5, unclipped": lambda: S5(3, 8, clip_eigs=False),
    "S5, slow": lambda: S5(3, 16, dt_min=1e-5, dt_max=2e-5),
    "S5, fast": lambda: S5(3, 16, dt_min=0.1, dt_max=10.0),
    "S5, dropout": lambda: S5(3, 8, dropout=0.5),
    "S5, wide": lambda: S5(53, 36),
    "LRU": lambda: LRU(3, 8),
    "LRU, N=2": lambda: LRU(3, 2),
    "LRU, N=64": lambda: LRU(2),
    "LRU, ring": lambda: LRU(3, 16, r_min=0.9, r_max=0.999, max_phase=0.314),
    "LRU, dropout": lambda: LRU(3, 8, dropout=0.5),
    "LRU, wide": lambda: LRU(49, 34),
}
"""One system for all inputs."""

TAPS = {
    "ShortConv": lambda: ShortConv(3),
    "ShortConv, K=1": lambda: ShortConv(3, 1),
    "ShortConv, K=2": lambda: ShortConv(3, 2),
    "ShortConv, K=7, no bias": lambda: ShortConv(2, 7, bias=False),
    "ShortConv, dropout": lambda: ShortConv(3, dropout=0.5),
    "ShortConv, wide": lambda: ShortConv(50),
}

SELECTIVE = {
    "S6": lambda: S6(6, 3),
    "S6, N=1": lambda: S6(4, 1, dt_rank=3),
    "S6, groups": lambda: S6(6, 3, ngroups=2),
    "S6, fixed B, groups": lambda: S6(6, 3, ngroups=3, variable_B=False),
    "S6, fixed C": lambda: S6(6, 3, variable_C=False),
    "S6, fixed B and C": lambda: S6(4, 2, variable_B=False, variable_C=False),
    "S6, slow": lambda: S6(4, 3, dt_min=1e-5, dt_max=2e-5, dt_init_floor=1e-6),
    "S6, fast": lambda: S6(4, 3, dt_min=0.1, dt_max=10.0),
    "S6, dropout": lambda: S6(4, 3, dropout=0.5),
    "S6, wide": lambda: S6(50, 4),
}
"""Step sizes and gains from the input."""

HEADS = {
    "SSD": lambda: layers.SSD(6, 3, headdim=2),
    "SSD, groups, D of features": lambda: layers.SSD(8, 3, headdim=2, ngroups=2, D_has_hdim=True),
    "SSD, limits": lambda: layers.SSD(4, 3, headdim=4, dt_limit=(0.2, 0.6)),
    "SSD, dropout": lambda: layers.SSD(4, 2, headdim=2, dropout=0.5),
    "SSD, wide": lambda: layers.SSD(51, 4, headdim=17),
}
"""One decay per head."""

# The norms at the end have a large eps: without it, a norm amplifies small errors of inputs near zero in every mode.
COMPOSED = {
    "Pointwise": lambda: Pointwise(nn.Linear(3, 5)),
    "Pointwise, own module": lambda: Sequential(nn.Linear(3, 4), Pointwise(RootMeanSquare())),
    "TiedDropout": lambda: TiedDropout(3, 0.5),
    "Sequential": lambda: Sequential(S4(3, 4), nn.GELU(), nn.Linear(3, 8), nn.GLU(), S4D(4, 4), nn.RMSNorm(4, eps=0.1)),
    "Sequential of nothing but pointwise": lambda: Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Softmax(-1)),
    "Sequential, nested": lambda: Sequential(Sequential(S4D(3, 4)), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))),
    "Embedding": lambda: Sequential(nn.Embedding(7, 4), S4D(4, 4), nn.Linear(4, 7)),
    "Checkpoint": lambda: Checkpoint(S4Block(4, S4D(4, 4), dropout=0.5), MultiRate(4, S4(8, 4))),
    "Residual": lambda: Residual(nn.LayerNorm(3), S4(3, 4), nn.GELU()),
    "Product": lambda: Product(S4D(3, 4), Sequential(nn.Linear(3, 3), nn.Sigmoid())),
    "Product of gates": lambda: Sequential(
        nn.Linear(3, 8), Product(nn.GLU(), Sequential(nn.Linear(8, 4), S4(4, 4)), nn.Linear(8, 4)), nn.Linear(4, 2)
    ),
    "Product of one": lambda: Sequential(Product(nn.Linear(3, 4)), nn.GLU()),
    "Concatenate": lambda: Concatenate(S4(3, 4), nn.Linear(3, 2), S4D(3, 4, channels=2)),
    "Concatenate, long": lambda: Sequential(
        nn.Linear(3, 40),
        Concatenate(nn.Identity(), nn.GLU(), S4D(40, 2, channels=2)),
        nn.GELU(),
        nn.RMSNorm(140, eps=0.1),
        nn.Linear(140, 3),
    ),
    "Branches, nested": lambda: Residual(
        Concatenate(Product(S4D(4, 4), MultiRate(4, S4D(8, 4), 3)), Residual(nn.Linear(4, 4))), nn.Linear(8, 4)
    ),
    "S4Block": lambda: S4Block(4),
    "S4Block, GLU, dropout": lambda: S4Block(4, S4D(4, 4), glu=True, dropout=0.3),
    "S4Block, tied dropout": lambda: S4Block(4, S4D(4, 4, channels=2), tie_dropout=True, dropout=0.3),
    "MultiRate": lambda: MultiRate(2, S4D(4, 4)),
    "MultiRate, pool 3, expand 1": lambda: MultiRate(2, S4D(2, 4), pool=3, expand=1),
    "MultiRate, pool 1": lambda: MultiRate(2, S4D(4, 4), pool=1),
    "MultiRate of pointwise": lambda: MultiRate(2, Sequential(nn.Linear(4, 4), nn.GELU()), pool=2),
    "MultiRate, nested": lambda: Residual(
        MultiRate(2, Sequential(Residual(MultiRate(4, S4Block(8, S4D(8, 4)), 2)), S4D(4, 4)), 3)
    ),
}

# Wider than a cache line, and not a multiple of one, so that the threads of a team share every layer.
COMPOSED |= {
    "wide Sequential": lambda: Sequential(nn.Linear(49, 64), S4(64, 4), nn.Softmax(-1), nn.GELU(), nn.Linear(64, 50)),
    "wide GLU": lambda: Sequential(nn.RMSNorm(100), nn.GLU(), S4D(50, 4)),
    "wide S4Block": lambda: S4Block(51, S4D(51, 4), glu=True),
    "wide S4Block, channels": lambda: S4Block(48, S4(48, 4, channels=2)),
    "wide Residual": lambda: Residual(nn.Linear(50, 100), nn.GLU(), S4D(50, 4), nn.Linear(50, 50)),
    "wide MultiRate": lambda: Sequential(
        MultiRate(33, Sequential(S4D(66, 4), MultiRate(66, S4Block(66, S4D(66, 4)), 2, 1)), 3), nn.RMSNorm(33, eps=0.1)
    ),
    "wide MultiRate after channels": lambda: Sequential(
        S4D(33, 4, channels=2), Residual(MultiRate(66, Sequential(nn.Linear(66, 66)), 2, 1))
    ),
    "wide Embedding": lambda: Sequential(nn.Embedding(7, 65), S4D(65, 4), nn.Linear(65, 66), nn.GLU()),
}

COMPOSED |= {
    "S4Block of S5": lambda: S4Block(4, S5(4, 8), glu=True),
    "MultiRate of S5": lambda: MultiRate(2, Sequential(ShortConv(4), nn.SiLU(), S5(4, 8)), 3),
    "Residual of LRU": lambda: Residual(nn.LayerNorm(3), LRU(3, 8), nn.GELU()),
    "Mamba": lambda: Mamba(4),
    "Mamba, biases, expand 1": lambda: Mamba(5, 3, 2, 1, dt_rank=2, bias=True, conv_bias=False),
    "Residual of Mamba": lambda: Sequential(*(Residual(nn.RMSNorm(4, eps=0.1), Mamba(4, 3)) for _ in range(2))),
    "Mamba2": lambda: Mamba2(4, 3, headdim=4),
    "Mamba2, groups, biases": lambda: Mamba2(6, 3, 3, headdim=3, ngroups=2, bias=True, conv_bias=False),
    "Mamba2, norm before gate": lambda: Mamba2(4, 3, headdim=2, norm_before_gate=True, ngroups=2),
    "Mamba2, no norm": lambda: Mamba2(4, 3, headdim=8, expand=4, rmsnorm=False, dt_limit=(0.05, 0.1)),
    "Residual of Mamba2": lambda: Sequential(
        *(Residual(nn.RMSNorm(4, eps=0.1), Mamba2(4, 3, headdim=4)) for _ in "ab")
    ),
    "MultiRate of Mamba2": lambda: MultiRate(2, Mamba2(4, 3, headdim=4), 3),
    "MultiRate of Mamba": lambda: MultiRate(2, Mamba(4, 3), 3),
    "wide Mamba": lambda: Mamba(33, 3),
    "H3": lambda: Sequential(
        Product(
            nn.Linear(4, 4), Sequential(Product(Sequential(nn.Linear(4, 4), ShortConv(4)), nn.Linear(4, 4)), S4D(4, 4))
        ),
        nn.Linear(4, 4),
    ),
}

COMPOSED |= {
    "Checkpoint of S4D": lambda: Checkpoint(S4Block(4, S4D(4, 4), dropout=0.5), S5(4, 4)),
    "Concatenate of S4D": lambda: Concatenate(S4D(3, 4), nn.Linear(3, 2), S5(3, 4), S4D(3, 4, channels=2)),
    "Product of S4D and S6": lambda: Product(S4D(4, 4, discretization="bilinear"), S6(4, 2), nn.Linear(4, 4)),
}


def started(layer):
    """A layer that starts from a state other than rest."""
    layer = LearnedStart(layer)
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.normal_()
    return layer


COMPOSED |= {
    "LearnedStart": lambda: started(S4(3, 4)),
    "LearnedStart of S5": lambda: started(S5(3, 4)),
    "LearnedStart of Mamba": lambda: started(Mamba(4, 3)),
    "LearnedStart of LRU, inside": lambda: Residual(nn.LayerNorm(3), started(LRU(3, 4)), nn.GELU()),
    "LearnedStart of a network": lambda: started(
        Sequential(nn.Embedding(7, 4), S4Block(4, S4D(4, 4), tie_dropout=True, dropout=0.3), nn.Linear(4, 7))
    ),
    "LearnedStart of MultiRate": lambda: started(Residual(MultiRate(2, Sequential(ShortConv(4), S4D(4, 4)), 3))),
    "MultiRate of LearnedStart": lambda: MultiRate(2, started(S4D(4, 4)), 3),
    "S4Block of LearnedStart": lambda: S4Block(4, started(S4D(4, 4)), glu=True),
    "LearnedStart in LearnedStart": lambda: started(Sequential(nn.Linear(3, 3), started(ShortConv(3, 2)), S5(3, 4))),
    "LearnedStart of nothing": lambda: started(Sequential(nn.Linear(3, 3), ShortConv(3, 1))),
    "Branches of LearnedStart": lambda: Concatenate(
        started(Checkpoint(S4D(3, 4))), Product(started(S6(3, 2)), S4D(3, 4))
    ),
}

CAUSAL = {**SSM, **SHARED, **TAPS, **SELECTIVE, **HEADS, **COMPOSED}


@functools.cache
def takes_time_stamps(make):
    """Whether a member takes a tensor of rates: none of its parts counts samples or is more than diagonal."""
    refuse = (S4, LRU, MultiRate)
    return not any(
        isinstance(module, refuse) or (isinstance(module, ShortConv) and not module.any_rate)
        for module in make().modules()
    )


TIMED = {
    name: make
    for name, make in CAUSAL.items()
    if takes_time_stamps(make) and any(isinstance(module, (S4D, S5, S6, layers.SSD)) for module in make().modules())
}
"""Causal layers, and containers of such, whose samples may lie at irregular times."""

NOT_STREAMED = (RootMeanSquare,)
"""Modules that cannot be lowered to a compiled program."""


@functools.cache
def streamed(make):
    """Whether a member runs as a compiled program."""
    return not any(isinstance(module, NOT_STREAMED) for module in make().modules())


BIDIRECTIONAL = {
    "S4": lambda: S4(3, 8, bidirectional=True),
    "S4, tied channels": lambda: S4(6, 8, channels=2, n_ssm=2, bidirectional=True),
    "S4D": lambda: S4D(3, 8, bidirectional=True),
    "S4D, channels": lambda: S4D(3, 8, channels=2, bidirectional=True),
}

SHARED_BIDIRECTIONAL = {
    "S5": lambda: S5(3, 8, bidirectional=True),
    "S5, blocks": lambda: S5(3, 8, blocks=2, discretization="bilinear", bidirectional=True),
}

FORWARD_ONLY = {
    "Sequential": lambda: Sequential(nn.Linear(3, 4), S4D(4, 4), S4(4, 4, bidirectional=True), nn.Linear(4, 2)),
    "Sequential, nested": lambda: Sequential(Sequential(S4D(3, 4)), Residual(S4D(3, 4, bidirectional=True))),
    "Checkpoint": lambda: Checkpoint(nn.LayerNorm(3), S4D(3, 4, bidirectional=True)),
    "Residual": lambda: Residual(nn.LayerNorm(3), S4D(3, 4, bidirectional=True), nn.GELU()),
    "S4Block": lambda: S4Block(4, S4(4, 4, bidirectional=True)),
    "Product": lambda: Product(S4D(3, 4), S4D(3, 4, bidirectional=True)),
    "Concatenate": lambda: Concatenate(S4D(3, 4, bidirectional=True), nn.Linear(3, 2)),
    "MultiRate": lambda: MultiRate(2, S4D(4, 4, bidirectional=True)),
    "MultiRate, nested": lambda: MultiRate(
        2, Sequential(S4D(4, 4), Residual(MultiRate(4, S4D(8, 4, bidirectional=True), 2))), 3
    ),
}
"""Containers around a layer that is not causal."""

GRIDS = {
    "layer": lambda: Grid(3),
    "Sequential": lambda: Sequential(nn.Linear(3, 4), Grid(4), nn.GELU(), nn.Linear(4, 2)),
    "Checkpoint": lambda: Checkpoint(Grid(3)),
    "Residual": lambda: Residual(nn.LayerNorm(3), Grid(3)),
    "S4Block": lambda: S4Block(4, Grid(4)),
    "Product": lambda: Product(Grid(3), Sequential(nn.Linear(3, 3), nn.Sigmoid())),
    "Concatenate": lambda: Concatenate(Grid(3), nn.Linear(3, 2)),
    "MultiRate": lambda: MultiRate(2, Grid(4), 3),
}
"""A user's own layer over two axes, alone and in every container."""
