"""Functions that make a user's own network."""

import pytest
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models.factory import build_with_factory


def test_factory_is_found_and_called(package):
    assert isinstance(build_with_factory("own_factories:good"), nn.Linear)
    assert isinstance(build_with_factory("own_factories:Inner.make"), nn.Linear)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("own_factories", "Expected PACKAGE.MODULE:CALLABLE"),
        ("own_factories:", "Expected PACKAGE.MODULE:CALLABLE"),
        ("../own:good", "Expected PACKAGE.MODULE:CALLABLE"),
        ("no_such_package.x:good", "there is no module no_such_package"),
        ("own_factories:bad", "own_factories has no bad"),
        ("own_factories:number", "is of type int, not a callable"),
        ("own_factories:other", "must return a torch.nn.Module, but returned str"),
        ("own_factories:failing", "failed: KeyError: 'x'"),
        ("own_broken:good", "failed: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ],
)
def test_factory_that_makes_no_network_is_refused(package, factory, said):
    with pytest.raises(ModelError, match=said):
        build_with_factory(factory)
