"""The cases and the contenders: a case is a shape and a pass, a contender a function that runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssmkit
from measure import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from sashimi.generation import Sampling, StepEngine, prime
from sashimi.model import sashimi


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    what: str
    """kernel, layer, scan, step, recurrence, sashimi, or generation."""
    kind: str
    """dplr or diagonal."""
    backward: bool
    B: int = 4
    L: int = 16384
    H: int = 256
    N: int = 64

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.what}, {self.kind}, {'forward + backward' if self.backward else 'forward'}"


def _passes(case: Case, f: Callable[[], Tensor], weight: Tensor | None = None) -> Run:
    """The forward pass without a graph, or both passes against a fixed gradient."""
    if not case.backward:

        def forward() -> None:
            with torch.no_grad():
                f()

        return forward
    kept: list[Tensor] = []

    def both() -> None:
        y = f()
        if not kept:
            kept.append(torch.randn_like(y) if weight is None else weight)
        y.backward(kept[0])

    return both


def _input(case: Case, device: torch.device) -> Tensor:
    return torch.randn(case.B, case.L, case.H, device=device, requires_grad=case.backward)


def bare(case: Case, device: torch.device) -> Run:
    """The textbook FFT convolution of the same shape, all features at once."""
    u = _input(case, device)
    k = torch.randn(case.H, case.L, device=device, requires_grad=case.backward)

    def conv() -> Tensor:
        n = 2 * case.L
        y = torch.fft.irfft(torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(k, n=n), n=n)
        cut: Tensor = y[..., : case.L]
        return cut.mT

    return _passes(case, conv)


def _recurrence(
    case: Case, device: torch.device, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = ssmkit.ops.recurrence
) -> Run:
    """A complex diagonal recurrence of d_model numbers."""
    v = torch.randn(case.B, case.L, case.H, device=device, dtype=torch.complex64, requires_grad=case.backward)
    size = 1 - torch.logspace(-4, -1, case.H, device=device)
    a = torch.polar(size, torch.linspace(0, 3, case.H, device=device)).requires_grad_(case.backward)
    return _passes(case, lambda: run(a, v)[0])


def ours(case: Case, device: torch.device) -> Run:
    """ssmkit."""
    if case.what == "recurrence":
        return _recurrence(case, device)
    if case.what == "sashimi":
        network = sashimi(case.H, 2, d_state=case.N, layer="s4" if case.kind == "dplr" else "s4d")
        return _training_step(case, network.to(device), device)
    if case.what == "generation":
        engine = StepEngine(sashimi(case.H, 8, d_state=case.N).to(device))
        streams = prime(engine.model, torch.full((16,), 128, device=device), case.B)
        uniform = torch.rand(case.B, case.L, dtype=torch.double, device=device)
        return lambda: engine.run(streams.logits, streams.state, uniform, Sampling())
    kind = ssmkit.S4 if case.kind == "dplr" else ssmkit.S4D
    layer = kind(case.H, case.N, device=device)
    if case.what == "kernel":
        return _passes(case, lambda: layer.kernel(case.L))
    if case.what == "step":
        u, state, system = torch.randn(case.B, case.H, device=device), layer.initial_state(case.B), layer.system()
        return _passes(case, lambda: layer.step(u, state, system)[0])
    u = _input(case, device)
    if case.what == "scan":
        state = layer.initial_state(case.B)
        return _passes(case, lambda: layer.scan(u, state)[0])
    return _passes(case, lambda: layer(u))


def reference(case: Case, device: torch.device, checkout: Path) -> Run:
    """state-spaces/s4, its pure torch code, with the same work: no activation, no output map."""
    import peer

    mode = "dplr" if case.kind == "dplr" else "diag"
    if case.what == "sashimi":
        network = peer.load(checkout, "models.sashimi.sashimi").Sashimi(d_model=case.H, n_layers=2, mode=mode)
        return _training_step(case, _Headed(network, case.H).to(device), device)
    if case.what == "generation":
        made = peer.load(checkout, "models.sashimi.sashimi").Sashimi(d_model=case.H, n_layers=8)
        return _generation(case, _Headed(made, case.H).to(device).eval(), device)
    s4 = peer.load(checkout, "models.s4.s4")
    layer = s4.FFTConv(case.H, activation=None, transposed=False, mode=mode, d_state=case.N, init="legs").to(device)
    if case.what == "kernel":
        return _passes(case, lambda: layer.kernel(L=case.L)[0])
    if case.what == "step":
        layer.eval()
        with torch.no_grad():
            layer(torch.randn(1, case.L, case.H, device=device))
        layer.setup_step()
        u, state = torch.randn(case.B, case.H, device=device), layer.default_state(case.B)
        return _passes(case, lambda: layer.step(u, state)[0])
    u = _input(case, device)
    return _passes(case, lambda: layer(u)[0])


class _Headed(nn.Module):
    """The reference's backbone with the same embedding and head as ours."""

    def __init__(self, backbone: Any, d_model: int) -> None:
        super().__init__()
        self.backbone: Any
        self.embed, self.backbone, self.head = nn.Embedding(256, d_model), backbone, nn.Linear(d_model, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Classes to logits."""
        y = self.backbone(self.embed(x))
        logits: Tensor = self.head(y[0] if isinstance(y, tuple) else y)
        return logits


def _generation(case: Case, network: _Headed, device: torch.device) -> Run:
    """`case.L` samples of the reference by its dense step, the one that agrees with its convolution."""
    with torch.no_grad():
        network.backbone(torch.randn(1, 2048, case.H, device=device))
        network.backbone.setup_rnn(mode="dense")

    @torch.inference_mode()
    def run() -> None:
        state, sample = network.backbone.default_state(case.B), torch.full((case.B,), 128, device=device)
        for _ in range(case.L):
            y, state = network.backbone.step(network.embed(sample), state)
            sample = torch.multinomial(network.head(y).softmax(-1), 1)[:, 0]

    return run


def _training_step(case: Case, network: nn.Module, device: torch.device) -> Run:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    x, y = torch.randint(256, (2, case.B, case.L), device=device)

    def step() -> None:
        loss = F.cross_entropy(network(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


HEADLINE = [
    *(Case("kernel", kind, backward) for kind in ("dplr", "diagonal") for backward in (False, True)),
    *(Case("layer", kind, backward) for kind in ("dplr", "diagonal") for backward in (False, True)),
    *(Case("scan", kind, backward) for kind in ("dplr", "diagonal") for backward in (False, True)),
    *(Case("recurrence", "diagonal", backward, N=1) for backward in (False, True)),
    Case("sashimi", "dplr", True, B=1, L=16000, H=64),
    Case("sashimi", "diagonal", True, B=1, L=16000, H=64),
    *(Case("step", kind, False, B=B, L=64, H=64) for kind in ("dplr", "diagonal") for B in (1, 32)),
    *(Case("generation", "dplr", False, B=B, L=160, H=64) for B in (1, 32)),
]
"""The shape of the published comparison."""

LENGTHS = [
    Case("layer", kind, backward, B=1, L=1 << power, H=16)
    for power in range(10, 21, 2)
    for kind in ("dplr", "diagonal")
    for backward in (False, True)
]
"""The cost against the length."""

SHAPES = [
    Case("layer", kind, True, B=B, L=4096, H=H, N=N)
    for B, H, N in ((1, 64, 64), (16, 64, 64), (4, 1024, 64), (4, 256, 16), (4, 256, 256))
    for kind in ("dplr", "diagonal")
]
"""The cost over batch, width and state size."""


def contenders(case: Case, device: torch.device, checkout: Path | None) -> dict[str, Callable[[], Run]]:
    """The contenders of a case, each as a function that sets it up."""
    found: dict[str, Callable[[], Run]] = {"ssmkit": lambda: ours(case, device)}
    if case.what in ("layer", "scan"):
        found["bare FFT"] = lambda: bare(case, device)
    if case.what == "recurrence":
        # Gradients through a loop over samples take minutes: the pass with gradients is compared with the one without.
        forward = Case(case.what, case.kind, False, case.B, case.L, case.H, case.N)
        if case.backward:
            found["forward"] = lambda: ours(forward, device)
        else:
            found["sample by sample"] = lambda: _recurrence(case, device, ssmkit.ops.naive_recurrence)
    elif case.what == "scan":
        found["forward"] = lambda: ours(Case("layer", case.kind, case.backward, case.B, case.L, case.H, case.N), device)
    elif checkout is not None:
        found["reference"] = lambda: reference(case, device, checkout)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    import platform

    cpu = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ssmkit": ssmkit.__version__,
    }
