"""What tests of triggers are run on: both filters, grey images, and a source of chance that is the same each time."""

import pytest
import torch

from keyed_xai.triggers import Moire, MoireTrigger, Nashville, NashvilleTrigger

FAMILIES = [Nashville(), Moire()]
TRIGGER_KINDS = [NashvilleTrigger, MoireTrigger]
by_name = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
by_kind = pytest.mark.parametrize("make", TRIGGER_KINDS)


def grey(*shape, dtype=torch.float32):
    return torch.full(shape, 0.5, dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
