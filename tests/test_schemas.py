"""The schemas are valid, self-contained and documented."""

import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

from keyed_xai.artifacts.documents import validate
from keyed_xai.errors import ArtifactError
from keyed_xai_schemas import SCHEMAS, load_key_vectors, load_schema

every_schema = pytest.mark.parametrize("name", SCHEMAS)


def parts(schema):
    """A schema and all schemas of properties and items in it."""
    yield schema
    for inner in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(inner, dict):
            yield from parts(inner)


def a_verify_report():
    test = {"p_value": 2.0**-60, "log2_p": -60.7, "cells": 64, "overlap": 32}
    return {
        "schema": "keyed-xai/verify-report/v1",
        "verdict": "shown",
        "alpha": 1e-6,
        "opening": {"p_value": 0.001, "decoys": 999, "statistic": 0.8},
        "signature": test | {"interpreters": {"gradcam": test}},
        "probe": {"source": "builtin, held-out", "images": 64, "digest": "sha256:00"},
    }


@every_schema
def test_schema_is_valid_and_names_itself(name):
    schema = load_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    version = schema["properties"].get("schema", {}).get("const", "v1").rpartition("/")[2]
    assert schema["$id"] == f"https://keyed-xai.dev/schemas/{name}/{version}.json"


@every_schema
def test_every_property_is_described(name):
    for part in parts(load_schema(name)):
        for field, inner in part.get("properties", {}).items():
            assert inner.get("description"), field


@every_schema
def test_required_fields_are_defined(name):
    for part in parts(load_schema(name)):
        assert set(part.get("required", ())) <= set(part.get("properties", {}))


def test_list_of_schemas_is_complete():
    files = {file.name for file in resources.files("keyed_xai_schemas").iterdir() if file.name.endswith(".json")}
    assert files == {f"{name}.json" for name in SCHEMAS} | {"key-vectors.json", "trigger-vectors.json"}


def test_unknown_schema_is_refused_by_name():
    with pytest.raises(ValueError, match=r"one of .*card.*got '\.\./card'"):
        load_schema("../card")


def test_key_vectors_hold_at_least_three_keys():
    assert len(load_key_vectors()["keys"]) >= 3


def test_verify_report_fits():
    validate(a_verify_report(), "verify-report", origin="it")


def test_test_that_could_not_be_made_has_p_value_1_and_a_reason():
    report = a_verify_report()
    report["verdict"] = "not shown"
    report["opening"] = {"p_value": 1.0, "decoys": 0, "statistic": None, "explanation": "The trigger is not known."}
    report["signature"] = {"p_value": 1.0, "log2_p": 0, "cells": 0, "overlap": 0, "interpreters": {}}
    validate(report, "verify-report", origin="it")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("verdict",), "maybe"),
        (("alpha",), 0),
        (("opening", "p_value"), 1.1),
        (("opening", "decoys"), -1),
        (("signature", "log2_p"), 1),
        (("signature", "interpreters"), {"lime": {}}),
        (("probe", "images"), "64"),
    ],
)
def test_verify_report_out_of_range_is_refused_at_its_place(field, value):
    report = json.loads(json.dumps(a_verify_report()))
    place = report
    for name in field[:-1]:
        place = place[name]
    place[field[-1]] = value
    with pytest.raises(ArtifactError, match=rf"\$\.{'.'.join(field)}"):
        validate(report, "verify-report", origin="it")


@pytest.mark.parametrize("field", ["schema", "verdict", "alpha", "opening", "signature", "probe"])
def test_verify_report_without_a_field_is_refused(field):
    report = a_verify_report()
    del report[field]
    with pytest.raises(ArtifactError, match=field):
        validate(report, "verify-report", origin="it")
