"""Cards: round trips, and fields that are missing or out of order."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai.artifacts.card import Card, TriggerParameters, read_card, write_card
from keyed_xai.errors import ArtifactError
from keyed_xai.tensors import Tap
from tests.licensed import CARD
from tests.spoilt import json_values, leaves, put


class TestCard:
    def test_round_trip_keeps_every_field(self, tmp_path):
        write_card(tmp_path / "card.json", CARD)
        card = read_card(tmp_path / "card.json")
        assert card == CARD
        assert tuple(Tap(*fields) for fields in card.taps) == CARD.taps

    def test_optional_fields_may_be_left_out(self):
        card = replace(CARD, label_names=())
        assert "label_names" not in card.to_json()
        assert Card.from_json(card.to_json()) == card

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"mean": [0.5, 0.5]}, "mean has 2 values"),
            ({"std": [0.5, 0.5]}, "std has 2 values"),
            ({"std": [0]}, r"\$\.std\[0\]"),
            ({"label_names": ["cat"]}, "names 1 classes"),
            ({"thresholds": {"gradcam": 0.5}}, "different interpreters"),
            ({"interpreters": []}, "interpreters"),
            ({"interpreters": ["gradcam", "gradcam"]}, "uniqueItems"),
            ({"schema": "keyed-xai/card/v2"}, r"\$\.schema"),
            ({"weights_file": "../model.safetensors"}, "weights_file"),
            ({"weights_file": "model.safetensors\n"}, "weights_file"),
            ({"architecture": "resnet\x1b[31m"}, "architecture"),
            ({"architecture": "resnet\n"}, "architecture"),
            ({"input_size": [1, 32, 1.5]}, "input_size"),
            ({"input_size": [1, 4096, 4096]}, "must multiply to at most 4194304"),
            ({"input_size": [1, 1, 4097]}, "maximum 4096"),
            ({"pooling": {"grid": [65, 7]}}, "maximum 64"),
            ({"taps": [{"layer": f"l{number}", "kernel": 3, "stride": 1} for number in range(1025)]}, "maxItems 1024"),
            ({"taps": [{"layer": "stem", "kernel": 3, "stride": 1}] * 2}, "name a layer twice"),
            ({"taps": [{"layer": "stem", "kernel": 65, "stride": 1}]}, "maximum 64"),
            ({"trigger": {"family": "spread", "amplitude": 8, "tile": 257}}, "maximum 256"),
            ({"num_classes": 100_001}, "maximum 100000"),
            ({"num_classes": 10**400}, "maximum 100000"),
            ({"mean": [10**400]}, "maximum 1000000"),
            ({"label_names": ["x"] * 100_001}, "maxItems 100000"),
            ({"num_classes": True}, "num_classes"),
            ({"seed": "00"}, "expected no fields but"),
        ],
    )
    def test_card_that_is_out_of_order_is_refused(self, changes, says):
        with pytest.raises(ArtifactError, match=says):
            Card.from_json(CARD.to_json() | changes)

    @pytest.mark.parametrize("field", sorted(set(CARD.to_json()) - {"label_names"}))
    def test_missing_field_is_refused_by_name(self, field):
        document = CARD.to_json()
        del document[field]
        with pytest.raises(ArtifactError, match=field):
            Card.from_json(document)

    @given(path=st.sampled_from(list(leaves(CARD.to_json()))), value=json_values)
    @settings(max_examples=300, deadline=None)
    def test_any_value_anywhere_is_a_card_or_an_artifact_error(self, path, value):
        document = put(CARD.to_json(), path, value)
        try:
            card = Card.from_json(document)
        except ArtifactError:
            return
        assert Card.from_json(card.to_json()) == card

    def test_card_that_does_not_fit_is_not_written(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"trigger\.amplitude"):
            write_card(tmp_path / "card.json", replace(CARD, trigger=TriggerParameters("spread", -1.0, 16)))
        assert list(tmp_path.iterdir()) == []
