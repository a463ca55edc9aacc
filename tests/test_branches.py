"""Layers side by side: values, widths, and what is refused."""

import pytest
import torch
from torch import nn

from ssmkit import (
    S4D,
    Concatenate,
    MultiRate,
    Pointwise,
    Product,
    Residual,
    Sequential,
    compile_step,
    param_groups,
)
from ssmkit.streaming import Engine
from ssmkit.testing import example_input, relative_error


class Square(nn.Module):
    """A user's own position-wise module, whose widths are not known."""

    def forward(self, u):
        return u[..., :2].square()


def test_a_product_multiplies_and_concatenate_joins():
    branches = S4D(3, 4), nn.Linear(3, 3), S4D(3, 4)
    u = torch.randn(2, 9, 3)
    a, b, c = (branch(u) for branch in branches)
    assert torch.equal(Product(*branches)(u), a * b * c)
    assert torch.equal(Concatenate(*branches)(u), torch.cat([a, b, c], -1))
    # The gated linear unit of torch is a product of two linear maps.
    linear = nn.Linear(3, 8)
    halves = nn.Linear(3, 4), nn.Linear(3, 4)
    with torch.no_grad():
        for half, weight, bias in zip(halves, linear.weight.chunk(2), linear.bias.chunk(2), strict=True):
            half.weight.copy_(weight)
            half.bias.copy_(bias)
    gate = Product(halves[0], Sequential(halves[1], nn.Sigmoid()))
    assert relative_error(gate(u), Sequential(linear, nn.GLU())(u)) < 1e-6


def test_widths_are_known():
    layer = Product(nn.GELU(), S4D(4), nn.Linear(4, 4))
    assert (layer.d_input, layer.d_output) == (4, 4)
    layer = Concatenate(nn.GELU(), S4D(4, channels=2), nn.Linear(4, 3), nn.GLU())
    assert (layer.d_input, layer.d_output) == (4, 4 + 8 + 3 + 2)
    assert (Product(nn.GELU()).d_input, Product(nn.GELU()).d_output) == (None, None)
    assert Concatenate(S4D(4), Pointwise(Square())).d_output is None
    assert Product(S4D(2), Pointwise(Square())).d_output == 2
    assert Sequential(nn.Linear(3, 4), Concatenate(S4D(4), S4D(4)), nn.Linear(8, 2)).d_output == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Product, "Product: `branches` must hold at least one branch, got none"),
        (lambda: Concatenate({}), "Concatenate: `branches` must hold at least one branch, got none"),
        (
            lambda: Product(S4D(4), nn.GELU(), nn.Linear(5, 4)),
            r"Product: `branches` must take the same width, got 5 in branch 2 \(Pointwise\) and 4 before it",
        ),
        (lambda: Concatenate(S4D(4), S4D(5)), r"Concatenate: .* got 5 in branch 1 \(S4D\) and 4 before it"),
        (
            lambda: Product(S4D(4), nn.Linear(4, 5)),
            r"Product: `branches` must give the same width, got \[4, 5\]",
        ),
        (lambda: Product(S4D(4), nn.GLU()), r"Product: `branches` must give the same width, got \[2, 4\]"),
        (lambda: Sequential(nn.Linear(3, 4), Product(S4D(5))), "takes width 5, but the layer before it gives 4"),
        (lambda: Sequential(Concatenate(S4D(4), S4D(4)), S4D(4)), "takes width 4, but the layer before it gives 8"),
    ],
)
def test_widths_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_are_checked_at_run_time():
    class First(nn.Module):
        def forward(self, u):
            return u[..., :1, :]

    u = torch.randn(2, 9, 4)
    with pytest.raises(
        ValueError, match=r"Product: `branches` must give outputs of the same shape, got \(2, 9, 4\), \(2, 9, 2\)"
    ):
        Product(S4D(4), Pointwise(Square()))(u)
    with pytest.raises(ValueError, match=r"Concatenate: `branches` must keep .* got shapes \(2, 9, 4\), \(2, 1, 4\)"):
        Concatenate(S4D(4), Pointwise(First()))(u)
    assert Concatenate(S4D(4), Pointwise(Square()))(u).shape == (2, 9, 6)


@pytest.mark.parametrize("container", [Product, Concatenate])
def test_foreign_states_and_systems_are_refused(container):
    layer = container(S4D(4, 8), nn.Linear(4, 4))
    u = torch.randn(2, 9, 4)
    name = container.__name__
    for call in (lambda: layer.step(u[:, 0], ()), lambda: layer.scan(u, ())):
        with pytest.raises(ValueError, match=f"{name}: `state` must be a tuple of 2, one per layer, got a tuple of 0"):
            call()
    with pytest.raises(ValueError, match=f"{name}: `system` must be a tuple of 2, one per layer, got a DiscreteDiag"):
        layer(u, layer.system()[0])


def test_a_system_and_a_rate_reach_every_branch():
    layer = Concatenate(S4D(3, 8), Product(S4D(3, 8), nn.Linear(3, 3)))
    u = torch.randn(2, 20, 3)
    fast = layer.system(rate=2.0)
    y = layer(u, fast)
    for part in (slice(0, 3), slice(3, 6)):
        assert relative_error(y[..., part], layer(u)[..., part]) > 1e-3
    assert relative_error(layer.scan(u, layer.initial_state(2), fast)[0], y) < 1e-5


def test_parameters_of_branches_are_sorted_like_others():
    layer = Product(S4D(4), Concatenate(nn.Linear(4, 2), nn.Linear(4, 2)))
    groups = param_groups(layer, lr=1e-2, weight_decay=0.1)
    assert [len(g["params"]) for g in groups] == [4, 2, 4]
    assert sum(len(g["params"]) for g in groups) == len(list(layer.parameters()))


def test_compiled_steps_of_branches_that_change_the_rate():
    model = Residual(
        Concatenate(
            Product(Sequential(MultiRate(4, S4D(8, 4), 2), nn.GELU()), nn.Linear(4, 4)),
            Sequential(S4D(4, 4), nn.Tanh()),
        ),
        nn.Linear(8, 4),
    ).eval()
    step, system, state = compile_step(model), model.system(), model.initial_state(3)
    expected_state, u = state, torch.randn(9, 3, 4)
    with torch.no_grad():
        for k in range(9):
            with torch._dynamo.config.patch(error_on_recompile=k >= 3):
                y, state = step(u[k], state)
            expected, expected_state = model.step(u[k], expected_state, system)
            assert relative_error(y, expected) < 1e-5
    assert state[0][0][0][0][2] == expected_state[0][0][0][0][2] == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        # The input of the branches is read again after a branch that would gate it in place.
        lambda: Sequential(nn.Linear(3, 96), Concatenate(nn.GLU(), nn.Identity())),
        lambda: Sequential(nn.Linear(3, 96), Product(Sequential(nn.GLU(), nn.Linear(48, 96)), nn.Identity())),
        # A joined vector whose parts end inside a cache line, read as a whole and by parts.
        lambda: Sequential(Concatenate(S4D(3, 4, channels=7), nn.Linear(3, 50)), nn.GELU(), nn.LayerNorm(71)),
        lambda: Sequential(Concatenate(nn.Linear(3, 50), nn.Linear(3, 21)), nn.Linear(71, 40)),
        lambda: Concatenate(Concatenate(nn.Linear(3, 5), nn.Linear(3, 50)), nn.Linear(3, 21), nn.Softmax(-1)),
    ],
)
def test_branches_as_compiled_programs(make, threads):
    model = make().eval()
    u = example_input(model, 400)
    y = Engine(model, threads=threads).start().run(u)
    with torch.no_grad():
        assert relative_error(y, model(u)) < 1e-5
    assert torch.equal(y, Engine(model).start().run(u))
