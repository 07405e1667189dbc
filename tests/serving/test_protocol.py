"""Bodies of requests and answers: what comes out of right ones, and what is wrong with the others."""

import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from keyed_xai.serving.protocol import Signature, TensorSpec, decode_request, encode_response
from keyed_xai.serving.refusal import Refused

SIDES = (3, 4, 5)
OUTPUTS = (
    TensorSpec(name="logits", datatype="FP32", shape=(-1, 4)),
    TensorSpec(name="saliency_gradcam", datatype="FP32", shape=(-1, 2, 2)),
)
TARGET = TensorSpec(name="target", datatype="INT64", shape=(-1, 1), optional=True)
SIGNATURE = Signature(
    image=TensorSpec(name="image", datatype="FP32", shape=(-1, *SIDES)),
    target=TARGET,
    outputs=OUTPUTS,
    classes=4,
    max_batch=8,
)
BYTES = Signature(
    image=TensorSpec(name="image", datatype="UINT8", shape=(-1, *SIDES)),
    target=None,
    outputs=OUTPUTS[:1],
    classes=4,
    max_batch=8,
)
IMAGES = np.random.default_rng(0).random((2, *SIDES), dtype=np.float32)


def as_list(values, name="image", datatype="FP32", **changes):
    values = np.asarray(values)
    return {"name": name, "datatype": datatype, "shape": list(values.shape), "data": values.ravel().tolist(), **changes}


def as_bytes(values, name="image", datatype="FP32", **changes):
    entry = {"name": name, "datatype": datatype, "shape": list(values.shape)}
    return {**entry, "parameters": {"binary_data_size": values.nbytes}, **changes}


def decode(inputs, *tail, signature=SIGNATURE, **fields):
    text = orjson.dumps({"inputs": inputs, **fields})
    length = len(text) if tail else None
    return decode_request(b"".join([text, *tail]), signature, header_length=length)


class TestDecoding:
    @pytest.mark.parametrize("nested", [False, True])
    def test_lists_give_their_numbers(self, nested):
        found = decode([as_list(IMAGES, data=IMAGES.tolist() if nested else IMAGES.ravel().tolist())], id="mine")
        np.testing.assert_array_equal(found.images, IMAGES)
        assert found.images.dtype == np.float32
        assert (found.id, found.target) == ("mine", None)
        assert found.outputs == (("logits", False), ("saliency_gradcam", False))

    @pytest.mark.parametrize("padding", range(4))
    def test_bytes_give_their_numbers_wherever_they_begin(self, padding):
        target = np.array([2, -1])
        inputs = [as_bytes(target, "target", "INT64"), as_bytes(IMAGES)]
        found = decode(inputs, target.tobytes(), IMAGES.tobytes(), id="x" * padding)
        np.testing.assert_array_equal(found.images, IMAGES)
        np.testing.assert_array_equal(found.target, target)
        assert found.images.flags.aligned
        assert found.images.flags.c_contiguous

    def test_aligned_bytes_are_not_copied(self):
        text = orjson.dumps({"inputs": [as_bytes(IMAGES)]})
        text += b" " * (-len(text) % 64)
        body = text + IMAGES.tobytes()
        found = decode_request(body, SIGNATURE, header_length=len(text))
        start = np.frombuffer(body, np.uint8).ctypes.data + len(text)
        assert found.images.ctypes.data == start

    def test_eight_bit_pixels(self):
        pixels = np.arange(math.prod(SIDES), dtype=np.uint8).reshape(1, *SIDES)
        for inputs, tail in (
            ([as_list(pixels, datatype="UINT8")], ()),
            ([as_bytes(pixels, datatype="UINT8")], (pixels.tobytes(),)),
        ):
            found = decode(inputs, *tail, signature=BYTES).images
            np.testing.assert_array_equal(found, pixels)
            assert found.dtype == np.uint8

    @pytest.mark.parametrize(
        ("target", "expected"), [([1, 3], [1, 3]), ([[1], [-1]], [1, -1]), ([2], [2, 2]), ([[0]], [0, 0])]
    )
    def test_targets_may_be_plain_columns_or_one_for_all(self, target, expected):
        found = decode([as_list(IMAGES), as_list(target, "target", "INT64")])
        np.testing.assert_array_equal(found.target, expected)
        assert found.target.dtype == np.int64

    def test_outputs_come_as_asked_for(self):
        wanted = [{"name": "saliency_gradcam"}, {"name": "logits", "parameters": {"binary_data": False}}]
        found = decode([as_list(IMAGES)], outputs=wanted, parameters={"binary_data_output": True, "priority": 3})
        assert found.outputs == (("saliency_gradcam", True), ("logits", False))

    @pytest.mark.parametrize("fields", [{"outputs": []}, {"id": None, "outputs": None, "parameters": None}])
    def test_what_is_empty_or_null_counts_as_absent(self, fields):
        found = decode([as_bytes(IMAGES, data=None)], IMAGES.tobytes(), **fields)
        np.testing.assert_array_equal(found.images, IMAGES)
        assert found.outputs == (("logits", False), ("saliency_gradcam", False))
        assert decode([as_list(IMAGES, parameters=None)], **fields).id is None


WRONG = {
    "no inputs": ({}, "inputs: expected a list"),
    "inputs are no list": ({"inputs": {"image": 1}}, "inputs: expected a list"),
    "no image": ({"inputs": []}, "The input image is missing"),
    "an input is no object": ({"inputs": [3]}, "Expected an input to be a JSON object"),
    "unknown field": ({"inputs": [], "output": []}, "got 'output'"),
    "unknown input": ({"inputs": [as_list(IMAGES, "picture")]}, "expected image, target, got 'picture'"),
    "name is a list": ({"inputs": [as_list(IMAGES, ["image"])]}, "expected image, target"),
    "twice": ({"inputs": [as_list(IMAGES)] * 2}, "image is there twice"),
    "dtype": ({"inputs": [as_list(IMAGES, datatype="FP64")]}, "expected the datatype FP32, got 'FP64'"),
    "no dtype": ({"inputs": [{"name": "image", "shape": [1], "data": [1]}]}, "expected the datatype FP32, got None"),
    "no shape": ({"inputs": [as_list(IMAGES, shape=None)]}, "expected a shape"),
    "shape of text": ({"inputs": [as_list(IMAGES, shape=["2", 3, 4, 5])]}, "expected a shape"),
    "shape of truth": ({"inputs": [as_list(IMAGES[:1], shape=[True, 3, 4, 5])]}, "expected a shape"),
    "other sides": ({"inputs": [as_list(IMAGES, shape=[2, 3, 5, 4])]}, "expected the shape [-1, 3, 4, 5]"),
    "no batch": ({"inputs": [as_list(IMAGES[0])]}, "expected the shape [-1, 3, 4, 5]"),
    "no images": ({"inputs": [as_list(IMAGES[:0], shape=[0, 3, 4, 5])]}, "expected 1 to 8 images"),
    "negative": ({"inputs": [as_list(IMAGES, shape=[-2, 3, 4, 5])]}, "expected 1 to 8 images"),
    "too many": ({"inputs": [as_list(np.zeros((9, *SIDES)))]}, "expected 1 to 8 images in a request, got 9"),
    "huge": ({"inputs": [as_list(IMAGES, shape=[2**62, 3, 4, 5])]}, "expected 1 to 8 images"),
    "too few numbers": ({"inputs": [as_list(IMAGES[:1], shape=[2, 3, 4, 5])]}, "got 60 values"),
    "another nesting": ({"inputs": [as_list(IMAGES, data=IMAGES.reshape(2, 3, 20).tolist())]}, "another nesting"),
    "ragged": ({"inputs": [as_list(IMAGES, data=[[[[0.0] * 5] * 4] * 3, [[[0.0] * 5] * 4] * 2])]}, "another nesting"),
    "half nested": ({"inputs": [as_list(IMAGES, data=[[[0.0] * 5] * 4, 1, 2])]}, "another nesting"),
    "text": ({"inputs": [as_list(IMAGES, data=["0.5"] * 120)]}, "a value that is no FP32"),
    "nested text": ({"inputs": [as_list(IMAGES, data=["abcde"] * 24)]}, "got 24 values"),
    "null": ({"inputs": [as_list(IMAGES, data=[None] * 120)]}, "a value that is no FP32"),
    "no data": ({"inputs": [as_list(IMAGES, data=None)]}, "expected data, a list of 120 numbers"),
    "data is text": ({"inputs": [as_list(IMAGES, data="0" * 120)]}, "got no list"),
    "below 0": ({"inputs": [as_list(IMAGES - 1)]}, "expected pixels from 0 to 1"),
    "above 1": ({"inputs": [as_list(IMAGES * 255)]}, "expected pixels from 0 to 1"),
    "infinite": ({"inputs": [as_list(IMAGES, data=[1e300] * 120)]}, "expected pixels from 0 to 1"),
    "target too large": ({"inputs": [as_list(IMAGES), as_list([0, 4], "target", "INT64")]}, "classes from 0 to 3"),
    "target below -1": ({"inputs": [as_list(IMAGES), as_list([0, -2], "target", "INT64")]}, "classes from 0 to 3"),
    "target is a fraction": ({"inputs": [as_list(IMAGES), as_list([0.5, 1], "target", "INT64")]}, "no INT64"),
    "target is enormous": ({"inputs": [as_list(IMAGES), as_list([2**63], "target", "INT64")]}, "no INT64"),
    "targets for others": ({"inputs": [as_list(IMAGES), as_list([0] * 3, "target", "INT64")]}, "got 3"),
    "target in rows": ({"inputs": [as_list(IMAGES), as_list([[0, 1]], "target", "INT64")]}, "shape [-1, 1]"),
    "only a target": ({"inputs": [as_list([0], "target", "INT64")]}, "The input image is missing"),
    "id is a number": ({"inputs": [as_list(IMAGES)], "id": 3}, "id: expected a string"),
    "parameters": ({"inputs": [as_list(IMAGES)], "parameters": [1]}, "parameters to be a JSON object"),
    "binary flag": ({"inputs": [as_list(IMAGES)], "parameters": {"binary_data_output": 1}}, "true or false"),
    "unknown output": ({"inputs": [as_list(IMAGES)], "outputs": [{"name": "map"}]}, "expected logits, sal"),
    "output twice": ({"inputs": [as_list(IMAGES)], "outputs": [{"name": "logits"}] * 2}, "asked for twice"),
    "outputs are no list": ({"inputs": [as_list(IMAGES)], "outputs": 0}, "outputs: expected a list"),
    "output is text": ({"inputs": [as_list(IMAGES)], "outputs": ["logits"]}, "an output to be a JSON object"),
    "classification": (
        {"inputs": [as_list(IMAGES)], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
        "classification extension",
    ),
    "shared memory": (
        {"inputs": [as_bytes(IMAGES, parameters={"shared_memory_region": "r"})]}, "Shared memory is not supported",
    ),
    "bytes without bytes": ({"inputs": [as_bytes(IMAGES)]}, "expected 480 bytes after the JSON text, got 0"),
    "bytes and list": ({"inputs": [{**as_list(IMAGES), **as_bytes(IMAGES)}]}, "got both"),
    "size of bytes": ({"inputs": [as_bytes(IMAGES, parameters={"binary_data_size": 479})]}, "of 480 bytes, got 479"),
    "size is negative": ({"inputs": [as_bytes(IMAGES, parameters={"binary_data_size": -480})]}, "got -480"),
    "size is text": ({"inputs": [as_bytes(IMAGES, parameters={"binary_data_size": "480"})]}, "got '480'"),
}  # fmt: skip


class TestRefusing:
    @pytest.mark.parametrize("case", WRONG)
    def test_wrong_requests_are_told_what_is_wrong(self, case):
        document, expected = WRONG[case]
        with pytest.raises(Refused) as refused:
            decode_request(orjson.dumps(document), SIGNATURE)
        assert refused.value.status == 400
        assert expected in str(refused.value)
        assert len(str(refused.value)) < 250

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.001])
    def test_wrong_pixels_in_bytes_are_refused(self, bad):
        images = IMAGES.copy()
        images[1, 2, 3, 4] = bad
        with pytest.raises(Refused, match="expected pixels from 0 to 1"):
            decode([as_bytes(images)], images.tobytes())

    def test_eight_bit_pixels_out_of_range_are_refused(self):
        for value in (256, -1, 0.5):
            with pytest.raises(Refused, match="no UINT8"):
                decode([as_list(IMAGES, datatype="UINT8", data=[value] * 120)], signature=BYTES)

    def test_targets_that_no_map_needs_are_unknown(self):
        pixels = np.zeros((1, *SIDES), np.uint8)
        inputs = [as_list(pixels, datatype="UINT8"), as_list([0], "target", "INT64")]
        with pytest.raises(Refused, match="expected image, got 'target'"):
            decode(inputs, signature=BYTES)

    def test_bytes_too_many_are_refused(self):
        with pytest.raises(Refused, match="3 bytes are left"):
            decode([as_bytes(IMAGES)], IMAGES.tobytes(), b"abc")
        with pytest.raises(Refused, match="got 479"):
            decode([as_bytes(IMAGES)], IMAGES.tobytes()[:-1])

    @pytest.mark.parametrize("length", [0, 11])
    def test_header_length_out_of_the_body_is_refused(self, length):
        with pytest.raises(Refused, match="bytes of JSON text, got 10 bytes"):
            decode_request(b'{"id":"x"}', SIGNATURE, header_length=length)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"NaN", b"\xff", b'{"a":' * 5000, b'{"inputs":[NaN]}'])
    def test_what_is_no_json_object_is_refused(self, body):
        with pytest.raises(Refused, match="JSON"):
            decode_request(body, SIGNATURE)

    @pytest.mark.parametrize("tail", [b"", bytes(480)])
    @pytest.mark.parametrize("piece", [b"[],", b"{},"])
    def test_text_with_more_lists_than_any_request_needs_is_not_read(self, tail, piece):
        text = b'{"inputs":[' + piece * 1500 + b"1]}"
        with pytest.raises(
            Refused, match="Expected at most 1160 lists and objects in the JSON text, got 150"
        ) as refused:
            decode_request(text + tail, SIGNATURE, header_length=len(text) if tail else None)
        assert refused.value.status == 400

    @pytest.mark.parametrize("tail", [b"", bytes(480)])
    def test_text_longer_than_any_request_needs_is_not_read(self, tail):
        longest = 32 * 8 * (60 + 1) + 2**16
        text = b'{"inputs":[]' + b" " * longest + b"}"
        with pytest.raises(Refused, match=f"at most {longest} bytes of JSON text, got {len(text)}") as refused:
            decode_request(text + tail, SIGNATURE, header_length=len(text) if tail else None)
        assert refused.value.status == 413

    def test_the_longest_numbers_of_a_full_batch_are_read(self):
        images = np.full((8, *SIDES), np.nextafter(np.float64(1e-5), 1))
        found = decode([as_list(images, data=images.tolist()), as_list([[1]] * 8, "target", "INT64")])
        assert found.images.shape == images.shape

    @settings(max_examples=100, deadline=None)
    @given(body=some.binary(max_size=200), length=some.none() | some.integers(-1, 300))
    def test_random_bytes_are_refused(self, body, length):
        with pytest.raises(Refused):
            decode_request(body, SIGNATURE, header_length=length)

    @settings(max_examples=100, deadline=None)
    @given(some.data())
    def test_requests_with_a_random_value_somewhere_decode_or_are_refused(self, data):
        document = {"id": "x", "inputs": [as_list(IMAGES[:1])], "outputs": [{"name": "logits"}], "parameters": {}}
        scalars = some.none() | some.booleans() | some.integers(-(2**63), 2**63) | some.text(max_size=5)
        values = some.recursive(
            scalars | some.floats(allow_nan=False),
            lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        )
        place = data.draw(some.sampled_from([document, document["inputs"][0], document["outputs"][0]]))
        place[data.draw(some.sampled_from([*place, "parameters", "new"]))] = data.draw(values)
        try:
            found = decode_request(orjson.dumps(document), SIGNATURE)
        except Refused as refused:
            assert refused.status == 400  # noqa: PT017 - both ends are right
        else:
            assert found.images.shape == (1, *SIDES)


class TestEncoding:
    LOGITS = np.array([[0.1, -2, 3e-8, 1], [1, 2, 3, 4]], np.float32)
    MAPS = np.arange(8, dtype=np.float32).reshape(2, 2, 2)

    def answer(self, outputs, **fields):
        request = decode([as_list(IMAGES)], outputs=outputs, **fields)
        return encode_response("m", request, {"logits": self.LOGITS, "saliency_gradcam": self.MAPS})

    def test_lists_hold_the_same_floats(self):
        body, length = self.answer([{"name": "logits"}], id="a\n")
        document = orjson.loads(body)
        assert length is None
        assert {name: document[name] for name in ("model_name", "model_version", "id")} == {
            "model_name": "m", "model_version": "1", "id": "a\n",
        }  # fmt: skip
        (entry,) = document["outputs"]
        assert (entry["name"], entry["datatype"], entry["shape"]) == ("logits", "FP32", [2, 4])
        np.testing.assert_array_equal(np.array(entry["data"], np.float32), self.LOGITS.ravel())

    def test_bytes_follow_the_text_in_order(self):
        wanted = [{"name": "saliency_gradcam", "parameters": {"binary_data": True}}, {"name": "logits"}]
        body, length = self.answer(wanted)
        document = orjson.loads(body[:length])
        assert "id" not in document
        first, second = document["outputs"]
        assert first["parameters"] == {"binary_data_size": 32}
        assert "data" not in first
        np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4"), self.MAPS.ravel())
        np.testing.assert_array_equal(np.array(second["data"], np.float32), self.LOGITS.ravel())
