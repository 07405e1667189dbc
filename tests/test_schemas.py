"""The schemas are valid and documented, say everything once, and mean the same to other validators."""

import json
from collections import Counter
from copy import deepcopy
from importlib import resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from keyed_xai.artifacts.documents import validate
from keyed_xai.errors import ArtifactError
from keyed_xai_schemas import SCHEMAS, load_key_vectors, load_schema

FILES = {
    file.name: json.loads(file.read_text(encoding="utf-8"))
    for file in resources.files("keyed_xai_schemas").iterdir()
    if file.name.endswith(".json") and not file.name.endswith("-vectors.json")
}
FOLDER = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in FILES.items())
EXAMPLE = Path(__file__).parent / "artifacts" / "example-v1.keyed"

every_schema = pytest.mark.parametrize("name", SCHEMAS)


def parts(schema):
    """A schema and all schemas in it."""
    yield schema
    named = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    for inner in [*named, *(schema.get(keyword) for keyword in ("items", "additionalProperties", "propertyNames"))]:
        if isinstance(inner, dict):
            yield from parts(inner)


def references():
    """Every schema that has a `$ref`, with the name of its file."""
    return [(file, part) for file, schema in FILES.items() for part in parts(schema) if "$ref" in part]


def meaning(schema):
    """A schema without its words."""
    if not isinstance(schema, dict):
        return schema
    return {
        name: meaning(inner)
        for name, inner in schema.items()
        if name not in ("title", "description") or isinstance(inner, dict)  # a property may have such a name
    }


def size(schema):
    """How many objects, lists and values it has."""
    if isinstance(schema, dict | list):
        return 1 + sum(map(size, schema.values() if isinstance(schema, dict) else schema))
    return 1


def spoilt(document, part=None):
    """The document with each value in it, in its turn, replaced by one that is hardly ever right."""
    part = document if part is None else part
    for place in part if isinstance(part, dict) else range(len(part)):
        kept, part[place] = part[place], [None]
        yield deepcopy(document)
        part[place] = kept
        if isinstance(kept, dict | list):
            yield from spoilt(document, kept)


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
    assert schema["$id"] == f"{name}.json"
    version = schema["properties"].get("schema", {"const": f"keyed-xai/{name}/v1"})["const"]
    assert version.startswith(f"keyed-xai/{name}/v")


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
    assert set(FILES) == {f"{name}.json" for name in SCHEMAS} | {"common.json"}


def test_every_reference_is_to_a_part_of_the_folder_and_adds_to_it_or_describes_it():
    assert references()
    for file, part in references():
        named = FOLDER.resolver(file).lookup(part["$ref"]).contents
        assert not set(part) & set(named) - {"$ref", "description"}, part["$ref"]


def test_every_definition_is_used():
    defined = {f"{file}#/$defs/{name}" for file, schema in FILES.items() for name in schema.get("$defs", {})}
    used = {part["$ref"] if part["$ref"][0] != "#" else file + part["$ref"] for file, part in references()}
    assert defined <= used


def test_nothing_long_is_written_twice():
    written = [meaning(part) for schema in FILES.values() for part in parts(schema)]
    times = Counter(json.dumps(part, sort_keys=True) for part in written if size(part) >= 12)
    assert [part for part, count in times.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("verify-report", a_verify_report()),
        ("card", json.loads((EXAMPLE / "card.json").read_text())),
        ("license", json.loads((EXAMPLE / "license.json").read_text())),
        ("protect-report", json.loads((EXAMPLE / "report.json").read_text())),
    ],
)
def test_validators_that_follow_references_find_the_same(name, document):
    ours = Draft202012Validator(load_schema(name))
    theirs = Draft202012Validator(FILES[f"{name}.json"], registry=FOLDER)
    assert theirs.is_valid(document)
    for wrong in spoilt(document):
        ours_say, theirs_say = (
            [(each.json_path, each.message) for each in one.iter_errors(wrong)] for one in (ours, theirs)
        )
        assert ours_say == theirs_say


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
