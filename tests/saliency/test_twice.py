"""Operators that can be differentiated twice against those of torch that they stand for."""

import torch
from torch import nn

from keyed_xai.saliency.twice import twice_differentiable


def test_twins_that_can_be_differentiated_twice_have_the_same_values_and_gradients():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64).mul(4).requires_grad_()

    def derive(operator):
        with twice_differentiable():
            output = operator(images)
        (gradient,) = torch.autograd.grad(output.square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        return output, gradient

    for operator in (nn.functional.hardsigmoid, lambda x: nn.functional.scaled_dot_product_attention(x, x, x)):
        output, gradient = derive(operator)
        expected = operator(images)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), images)[0])
