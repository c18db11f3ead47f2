"""The loop's reduction must give the gradient of the plain weighted loss, and norms per term."""

import torch

from train.turns import Losses, reduce


def test_sending_the_gradient_back_equals_backward_through_the_whole():
    torch.manual_seed(0)
    role = torch.nn.Linear(5, 4)
    x, target = torch.randn(3, 5), torch.randn(3, 4)

    def terms(out):
        return (out - target).square().mean(1), out.abs().sum(1)

    out = role(x)
    near, size = terms(out)
    ((1.5 * near + 0.1 * size).sum() / 6).backward()
    expected = [p.grad.clone() for p in role.parameters()]
    role.zero_grad()

    losses = Losses.of([role(x)])
    near, size = terms(losses.at[0])
    losses.add("near", near, 1.5)
    losses.add("size", size, 0.1)
    reduced = reduce(losses, 6)
    reduced.surrogate.backward()
    for p, gradient in zip(role.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-5, atol=1e-7)
    assert torch.isclose(reduced.values["size"], size.double().sum() / 6)
    at = losses.at[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(0.1 * at.abs().sum() / 6, at)
    assert torch.isclose(reduced.squares["size"].sqrt(), gradient.double().norm())


def test_terms_together_have_the_same_gradient_and_no_norms_but_that_of_a_single_one():
    torch.manual_seed(0)
    out = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def reduced(apart, *names):
        losses = Losses.of([out])
        for name, power in zip(names, (2, 3), strict=False):
            losses.add(name, losses.at[0].pow(power).mean(1), power)
        result = reduce(losses, 3, apart)
        return result, torch.autograd.grad(result.surrogate, out)[0]

    (one, by_term), (other, whole) = reduced(True, "a", "b"), reduced(False, "a", "b")
    assert torch.allclose(by_term, whole, rtol=1e-6, atol=0)
    assert set(one.squares) == {"a", "b"} == set(other.values) and not other.squares
    assert one.values == other.values
    single, gradient = reduced(False, "a")
    assert torch.isclose(single.squares["a"], gradient.square().sum(), rtol=1e-6)


def test_an_output_no_term_uses_gets_no_gradient():
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    losses = Losses.of([a, b])
    losses.add("only", losses.at[0].square().mean(1))
    reduce(losses, 2).surrogate.backward()
    assert (b.grad == 0).all() and (a.grad != 0).any()
