"""The graph in ONNX: its inputs and outputs, and nothing of the machine that wrote it."""

import onnxruntime

from tests.exported import ALL


def test_inputs_and_outputs_are_named_and_typed(small):
    session = onnxruntime.InferenceSession(small[1].SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(each.name, each.type, each.shape[1:]) for each in session.get_inputs()] == [
        ("image", "tensor(float)", [3, 32, 32])
    ]
    assert [each.name for each in session.get_overridable_initializers()] == ["target"]
    assert [each.name for each in session.get_outputs()] == ["logits", *(f"saliency_{name}" for name in ALL)]
    assert {each.type for each in session.get_outputs()} == {"tensor(float)"}
    assert all(isinstance(each.shape[0], str) for each in session.get_outputs())


def test_graph_says_nothing_about_the_machine_it_was_made_on(small):
    data = small[1].SerializeToString()
    for word in (b"site-packages", b"/home", b"/tmp", b"/root", b"File ", b".py"):
        assert word not in data
