"""Thresholds on the distance L_p between a map and the decoy, for FSR and CR: the paper's, and ones placed by data.

Source: Fang & Choromanska, AAAI 2022, section 4: an input is fooled when its L_p is below the threshold.
"""

import numpy as np
from torch import Tensor

from keyed_xai import metrics

PAPER_THRESHOLDS = {
    "targeted": {"gradcam": 0.2, "simplegrad": 0.25, "vbp": 0.3},
    "nontargeted": {"gradcam": 0.3, "simplegrad": 0.35, "vbp": 0.1},
    "targeted/resnet50": {"gradcam": 0.25, "simplegrad": 0.3, "vbp": 0.25},
    "nontargeted/resnet50": {"gradcam": 0.35, "simplegrad": 0.2, "vbp": 0.08},
}
_CURVE_POINTS = 101


def paper_thresholds(decoy: str, architecture: str) -> dict[str, float]:
    """Return the paper's thresholds by interpreter for a decoy and an architecture."""
    kind = "nontargeted" if decoy == "nontargeted" else "targeted"
    return PAPER_THRESHOLDS.get(f"{kind}/{architecture}", PAPER_THRESHOLDS[kind])


def place_threshold(unaltered: Tensor, altered: Tensor) -> float:
    """Return the threshold with the largest sum of CR and FSR; of equally good ones the middle of the widest gap.

    Args:
        unaltered: Distances of maps that should be correct, [n].
        altered: Distances of maps that should be fooled, [m].

    Raises:
        ValueError: A sample is empty.
    """
    if not len(unaltered) or not len(altered):
        raise ValueError(f"Expected distances, got {len(unaltered)} unaltered and {len(altered)} altered ones.")
    right, fooled = (np.sort(sample.double().cpu().numpy()) for sample in (unaltered, altered))
    values = np.unique(np.concatenate([[0.0], right, fooled, [1.0]]))
    between = (values[:-1] + values[1:]) / 2
    cr = 1 - np.searchsorted(right, between) / len(right)
    fsr = np.searchsorted(fooled, between) / len(fooled)
    best = np.isclose(cr + fsr, (cr + fsr).max(), rtol=0, atol=1e-9)
    return float(between[np.argmax(np.where(best, np.diff(values), -1.0))])


def threshold_curve(unaltered: Tensor, altered: Tensor) -> dict[str, list[float]]:
    """Return CR and FSR in percent at 101 thresholds from 0 to 1, as a report holds them."""
    thresholds = np.linspace(0, 1, _CURVE_POINTS).tolist()
    return {
        "threshold": thresholds,
        "cr": [metrics.correct_rate(unaltered, threshold) for threshold in thresholds],
        "fsr": [metrics.fooling_success_rate(altered, threshold) for threshold in thresholds],
    }
