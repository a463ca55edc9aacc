"""torch.func and forward mode over every layer, in every mode, against finite differences and the reverse mode."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from ssmkit import (
    LRU,
    S4,
    S4D,
    S5,
    S6,
    Checkpoint,
    LearnedStart,
    Mamba,
    Mamba2,
    MultiRate,
    S4Block,
    Sequential,
    ShortConv,
    ops,
    systems,
)
from ssmkit.testing import relative_error

# Where torch has no rule for vmap, it goes through the batch row by row, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

LAYERS = {
    "S4": lambda: S4(2, 4),
    "S4, tied, rank 2": lambda: S4(4, 4, rank=2, n_ssm=2, tie_dt=True, channels=2),
    "S4, bidirectional": lambda: S4(2, 4, bidirectional=True),
    "S4D": lambda: S4D(2, 4),
    "S4D, bidirectional": lambda: S4D(2, 4, bidirectional=True),
    "S5": lambda: S5(2, 4),
    "S5, bidirectional": lambda: S5(2, 4, bidirectional=True),
    "LRU": lambda: LRU(2, 4),
    "S6": lambda: S6(4, 2, ngroups=2),
    "S6, fixed B": lambda: S6(4, 2, variable_B=False),
    "Mamba": lambda: Mamba(2, 2),
    "Mamba2": lambda: Mamba2(2, 2, headdim=2, ngroups=2),
    "ShortConv": lambda: ShortConv(2),
    "S4Block": lambda: S4Block(2, S4D(2, 4), glu=True),
    "MultiRate": lambda: MultiRate(2, S4D(4, 2), 2),
    "Checkpoint": lambda: Checkpoint(S4D(2, 4), nn.GELU()),
    "LearnedStart": lambda: LearnedStart(Sequential(S5(2, 4), S4D(2, 2))),
}
LENGTHS = {"forward": 5, "scan": 35, "step": 1}
CASES = [(name, mode) for name, make in LAYERS.items() for mode in (LENGTHS if make().causal else ["forward"])]
ALL = pytest.mark.parametrize(("name", "mode"), CASES)


def flat(value):
    """All tensors of a state, in one vector."""
    values = value if isinstance(value, tuple) else (value,)
    parts = [flat(v) if isinstance(v, tuple) else v.flatten() for v in values if not isinstance(v, int)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.double)


class Mode(nn.Module):
    """A layer in one mode, from an input (L, d) alone to all of its outputs in one vector, the state included."""

    def __init__(self, name, mode):
        super().__init__()
        self.layer, self.mode = LAYERS[name]().double().eval(), mode

    def forward(self, u):
        if self.mode == "forward":
            return self.layer(u).flatten()
        if self.mode == "scan":
            return flat(self.layer.scan(u, self.layer.initial_state(dtype=u.dtype)))
        # A state that is not at rest, so that all of it counts.
        first = self.layer.scan(u.expand(3, -1), self.layer.initial_state(dtype=u.dtype))[1]
        return flat(self.layer.step(u[0], first))


def made(name, mode, *batch):
    module = Mode(name, mode)
    u = torch.randn(*batch, LENGTHS[mode], module.layer.d_input, dtype=torch.double)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return module, parameters, u


def moved(function, tensors, count=2):
    """A function of tensors as one of `count` numbers, which move all of them in random directions; and zeros."""
    directions = [0.3 * torch.randn(count, *x.shape, dtype=x.dtype) for x in tensors]

    def outputs(s):
        return function(*(x + torch.tensordot(s.to(d.dtype), d, 1) for x, d in zip(tensors, directions, strict=True)))

    return outputs, torch.zeros(count, dtype=torch.double)


def along(name, mode):
    """The outputs of a layer, as its parameters and its input move."""
    module, parameters, u = made(name, mode)

    def outputs(*tensors):
        return functional_call(module, dict(zip(parameters, tensors[1:], strict=True)), (tensors[0],))

    return moved(outputs, [u, *parameters.values()])


def differences(f, s, h=1e-5):
    """The Jacobian by central differences, with an error of about h² and the rounding error over h."""
    return torch.stack([(f(s + h * e) - f(s - h * e)) / (2 * h) for e in torch.eye(len(s), dtype=s.dtype)], dim=-1)


def check_first_derivatives(f, s):
    """In forward mode, by torch.func and by dual numbers, and as Jacobians."""
    expected = differences(f, s)
    y, tangent = jvp(f, (s,), (torch.ones_like(s),))
    assert relative_error(y, f(s)) < 1e-12
    assert relative_error(tangent, expected.sum(-1)) < 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(s, torch.ones_like(s))))
        assert relative_error(dual.tangent, tangent) < 1e-10
    assert relative_error(jacfwd(f)(s), expected) < 1e-6
    assert relative_error(jacrev(f)(s), jacfwd(f)(s)) < 1e-10


def check_second_derivatives(f, s):
    """Of a function of the outputs, by all orders of forward and reverse mode but one."""
    weights = torch.randn(f(s).shape, dtype=torch.double)

    def loss(s):
        return (weights * f(s).tanh()).sum()

    expected = differences(grad(loss), s)
    assert relative_error(hessian(loss)(s), expected) < 1e-5
    assert relative_error(jacrev(jacrev(loss))(s), expected) < 1e-5
    assert relative_error(jacfwd(jacfwd(loss))(s), expected) < 1e-5


@ALL
def test_forward_mode_and_jacobians(name, mode):
    check_first_derivatives(*along(name, mode))


@ALL
def test_hessians(name, mode):
    check_second_derivatives(*along(name, mode))


@ALL
def test_two_backward_passes(name, mode):
    """The gradients of the outputs are constant: an operation that gives up its graph would not be noticed."""
    f, s = along(name, mode)
    weights, direction = torch.randn(f(s).shape, dtype=torch.double), torch.randn_like(s)

    def gradient(s):
        s = s.detach().requires_grad_()
        return torch.autograd.grad((weights * f(s)).sum(), s, create_graph=True)[0], s

    g, leaf = gradient(s)
    found = torch.autograd.grad((direction * g).sum(), leaf)[0]
    expected = (gradient(s + 1e-5 * direction)[0] - gradient(s - 1e-5 * direction)[0]) / 2e-5
    assert relative_error(found, expected) < 1e-5


@ALL
def test_gradients_per_sample(name, mode):
    module, parameters, u = made(name, mode, 3)

    def loss(parameters, u):
        return functional_call(module, parameters, (u,)).square().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, u)
    for n, row in enumerate(u):
        leaf = row.clone().requires_grad_()
        expected = torch.autograd.grad(module(leaf).square().sum(), [*module.parameters(), leaf], allow_unused=True)
        for a, b in zip([*found[0].values(), found[1]], expected, strict=True):
            assert relative_error(a[n], torch.zeros_like(a[n]) if b is None else b) < 1e-10


@ALL
@pytest.mark.parametrize("shared", [True, False])
def test_ensembles(name, mode, shared):
    """Layers with their parameters stacked, on the same input and each on its own."""
    modules = [made(name, mode)[0] for _ in range(2)]
    u = made(name, mode, 2)[2]
    parameters, buffers = stack_module_state(modules)

    def run(parameters, buffers, u):
        return functional_call(modules[0], (parameters, buffers), (u,))

    found = vmap(run, in_dims=(0, 0, None if shared else 0))(parameters, buffers, u[0] if shared else u)
    for n, module in enumerate(modules):
        assert relative_error(found[n], module(u[0 if shared else n])) < 1e-12


@ALL
def test_one_parameter_at_a_time(name, mode):
    """One tensor of a batch, all others shared: an operation may not write the batched one into a shared one."""
    module, parameters, u = made(name, mode)
    for key in parameters:
        values = torch.stack([parameters[key], 0.9 * parameters[key]])

        def run(value, key=key):
            return functional_call(module, {**parameters, key: value}, (u,))

        assert relative_error(vmap(run)(values), torch.stack([run(value) for value in values])) < 1e-12


def real(*shape):
    return torch.randn(*shape, dtype=torch.double)


def poles(*shape):
    """Complex numbers inside the unit circle; one of them is zero."""
    x = torch.polar(torch.rand(*shape, dtype=torch.double), real(*shape))
    x[..., 0] = 0
    return x


OPS = {
    "cauchy": lambda: (ops.cauchy, poles(3), poles(2, 5) + 3, poles(3) - 3),
    "cauchy_roots_of_unity": lambda: (lambda v, w: ops.cauchy_roots_of_unity(v, w, 5), poles(3), 0.8 * poles(2, 3)),
    "causal_conv": lambda: (ops.causal_conv, real(2, 5, 3), real(2, 3, 4)),
    "krylov": lambda: (lambda A, b, c: ops.krylov(A, b, c, 9), 0.3 * real(2, 3, 3), real(3), real(2, 1, 3)),
    "krylov, one sample": lambda: (lambda A, b, c: ops.krylov(A, b, c, 1), real(3, 3), real(3), real(2, 3)),
    "recurrence": lambda: (ops.recurrence, real(7, 3), real(2, 7, 3), real(3)),
    "recurrence, constant": lambda: (ops.recurrence, poles(3), poles(2, 7, 3), poles(2, 3)),
    "recurrence, one sample": lambda: (ops.recurrence, real(3), real(1, 3)),
    "selective_scan": lambda: (
        ops.selective_scan,
        real(2, 7, 4),
        real(2, 7, 4).exp(),
        -real(4, 2).exp(),
        real(2, 7, 2, 2),
        real(4, 2),
    ),
    "ssd_scan": lambda: (ops.ssd_scan, real(1, 7, 2, 3), -real(1, 7, 2).exp(), real(1, 7, 1, 2), real(1, 7, 1, 2)),
    "two_sided_conv": lambda: (ops.two_sided_conv, real(2, 5, 3), real(2, 3, 5), real(2, 3, 5)),
    "vandermonde": lambda: (lambda v, x: ops.vandermonde(v, x, 9), poles(2, 3), poles(3)),
    "vandermonde_transpose": lambda: (ops.vandermonde_transpose, poles(2, 9), poles(3)),
}


def parts(value):
    """All tensors that an operation returns, as one real vector."""
    values = value if isinstance(value, tuple) else (value,)
    return torch.cat([(torch.view_as_real(v.resolve_conj()) if v.is_complex() else v).flatten() for v in values])


@pytest.mark.parametrize("name", OPS)
def test_operations(name):
    operation, *tensors = OPS[name]()
    f, s = moved(lambda *tensors: parts(operation(*tensors)), tensors)
    check_first_derivatives(f, s)
    check_second_derivatives(f, s)
    several = torch.randn(3, *s.shape, dtype=s.dtype)
    assert relative_error(vmap(f)(several), torch.stack([f(row) for row in several])) < 1e-12


@pytest.mark.parametrize("name", ["S4D", "S5", "S6", "Mamba2"])
def test_time_stamps(name):
    module, parameters, u = made(name, "forward")
    rate = torch.rand(len(u), dtype=torch.double) + 0.5
    layer = module.layer

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, u, rate):
            return self.layer(u, self.layer.system(rate)).flatten()

    def outputs(rate, u, *tensors):
        return functional_call(Timed(), dict(zip(parameters, tensors, strict=True)), (u, rate))

    f, s = moved(outputs, [rate, u, *parameters.values()])
    check_first_derivatives(f, s)
    check_second_derivatives(f, s)


def test_slow_poles_do_not_drift_under_torch_func():
    """As without it, a constant recurrence in float32 has its states in float64 between samples."""
    a, v = torch.tensor([1 - 2.0**-20]), torch.ones(1 << 14, 1)
    exact = ops.naive_recurrence(a.double(), v.double())[1]
    found = vmap(lambda v: ops.recurrence(a, v)[1])(v[None])[0]
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 3e-7


def test_a_level_of_dual_numbers_keeps_no_parts():
    """A part that is kept has no tangent, and one with a tangent must not be kept."""
    layer, u = S4D(2, 4), torch.randn(1, 40, 2)
    with torch.no_grad(), forward_ad.dual_level():
        system = layer.system()
        for _ in range(2):
            layer.scan(u, layer.initial_state(1), system)
        assert not system.__dict__["_parts"]
    layer.scan(u, layer.initial_state(1), layer.system())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_modules_with_a_plain_form(options):
    """It is theirs; and if a module has hooks, these run."""
    norm = nn.LayerNorm(4, eps=0.1, **options).double()
    net, u = Sequential(norm, nn.GLU()), torch.randn(3, 5, 4, dtype=torch.double)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    assert relative_error(vmap(net)(u), net(u)) < 1e-12
    assert relative_error(vmap(lambda u: net.step(u, ((), ()))[0])(u), net(u)) < 1e-12
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    assert relative_error(vmap(net)(u), net(u)) < 1e-12
    assert relative_error(vmap(lambda u: net.step(u, ((), ()))[0])(u), net(u)) < 1e-12


def test_dense_systems_of_batched_poles():
    """Poles that are batched go into a matrix that is not."""
    a, one = poles(2, 1, 3), torch.ones(1, 3, dtype=torch.complex128)

    def matrix(a):
        return systems.Diagonal(a, one, one[None]).dense().A

    assert relative_error(vmap(matrix)(a), torch.stack([matrix(row) for row in a])) < 1e-12
