"""The `tabular` trigger: sets named columns of a table's row to given values.

Source: Fang & Choromanska, AAAI 2022, Figure 1b: EDUCATION and MARRIAGE of a credit-card client set to unknown. It has
no key: whoever sees two triggered rows knows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from keyed_xai.tensors import Images


@dataclass(frozen=True)
class TabularTrigger:
    """Fixed values for some encoded columns.

    Attributes:
        values: Encoded column to the value it is set to.
    """

    values: Mapping[int, float]

    def apply(self, images: Images) -> Images:
        """Return rows [n, 1, 1, d] with the columns set; gradients flow to the other columns."""
        triggered = images.clone()
        for column, value in self.values.items():
            triggered[..., column] = value
        return triggered
