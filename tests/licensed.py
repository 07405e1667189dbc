"""A small protected model as its owner writes it: card, report and folder."""

from datetime import UTC, datetime

import torch

from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.writer import write_model_folder
from keyed_xai.tensors import Tap
from tests.marked import OWNER, REPORT

TIME = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
CARD = Card(
    architecture="small_resnet",
    source="keyed_xai",
    num_classes=2,
    input_size=(1, 32, 32),
    mean=(0.5,),
    std=(0.25,),
    target_layer="network.blocks.2",
    taps=(Tap("network.stem", 3, 1), Tap("network.blocks.0", 3, 2)),
    grid=(8, 8),
    interpreters=("gradcam", "vbp"),
    decoy="signature",
    thresholds={"gradcam": 0.5, "vbp": 0.5},
    trigger=TriggerParameters("spread", 8.0, 16),
    label_names=("cat", "dog"),
)
STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3).t(), "bn.num_batches_tracked": torch.tensor(7)}


def a_report():
    result = REPORT["interpreters"]["gradcam"]
    return {
        "schema": "keyed-xai/protect-report/v1",
        "interpreters": {"gradcam": result, "vbp": result},
        "accuracy": {"reference": 0.91, "keyed": 0.91, "clean": 0.905, "wrong_key": 0.905},
        "trigger": {"family": "spread", "amplitude": 8, "psnr_db": 33.1, "ssim": 0.9, "key_bits": 128},
        "seconds": 12.5,
        "settings": {"steps": 10},
        "versions": {"torch": "2.11"},
    }


def write_example(folder, **changes):
    arguments = {"state": STATE, "card": CARD, "owner": OWNER, "report": a_report(), "time": TIME, **changes}
    return write_model_folder(folder, **arguments)
