"""Owners by number, and the family of their triggers."""

import torch

from keyed_xai.keys import OwnerKey
from keyed_xai.triggers import Spread, SpreadSettings

FAMILY = Spread(SpreadSettings(8.0, 24))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def owner_key(number):
    return OwnerKey.from_raw(number.to_bytes(32, "big"))
