"""A file of weights alone: it says how it is run, and keeps the names of the file it came from."""

import torch
from safetensors.torch import load
from torch import nn

from keyed_xai.artifacts.opening import open_model
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet, TableMLP


def small_classifier(**options):
    torch.manual_seed(0)
    spec = InputSpec(1, 32, 40, mean=(0.25,), std=(0.5,))
    network = SmallResNet(1, 3, (4, 6)).eval()
    return wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai", **options).eval()


class TestWeightsFile:
    def test_file_says_by_itself_how_it_is_run(self, tmp_path):
        classifier = small_classifier()
        classifier.label_names, classifier.multi_label = ("cat", "dog", "owl"), True
        (tmp_path / "m.safetensors").write_bytes(encode_weights(classifier))
        loaded, card = open_model(tmp_path / "m.safetensors")
        assert card is None
        assert loaded.input == classifier.input
        assert (loaded.label_names, loaded.multi_label) == (("cat", "dog", "owl"), True)
        assert (loaded.architecture, loaded.source, loaded.classes) == ("SmallResNet", "keyed_xai", 3)
        assert (loaded.target_layer, loaded.taps) == (classifier.target_layer, classifier.taps)
        images = torch.rand(2, 1, 32, 40, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(images), classifier(images))

    def test_table_s_network_loads_too(self, tmp_path):
        torch.manual_seed(0)
        spec = InputSpec(1, 1, 7, mean=(0.0,), std=(1.0,))
        classifier = wrap_network(TableMLP(7, 2, (8, 6)).eval(), input=spec, architecture="TableMLP",
                                  source="keyed_xai", require_map=False).eval()  # fmt: skip
        (tmp_path / "m.safetensors").write_bytes(encode_weights(classifier))
        loaded, _ = open_model(tmp_path / "m.safetensors", require_map=False)
        rows = torch.randn(3, 1, 1, 7, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(rows), classifier(rows))

    def test_names_are_those_of_the_owner_s_file(self, tmp_path):
        """A wrapper's prefix in the file that was loaded is kept in the file that is written."""
        state = {f"module.{name}": tensor for name, tensor in small_classifier().network.state_dict().items()}
        torch.save(state, tmp_path / "m.pt")
        loaded, _ = open_model(tmp_path / "m.pt", input_size=(32, 40), mean=(0.25,), std=(0.5,))
        written = load(encode_weights(loaded))
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in state.items())

    def test_shared_and_strided_tensors_are_written(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.second = nn.Linear(4, 4)
                self.second.weight = self.first.weight
                self.third = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)

            def forward(self, images):
                return self.second(self.first(images.flatten(1))) @ self.third

        network = Tied()
        spec = InputSpec(1, 2, 2, mean=(0.0,), std=(1.0,))
        classifier = wrap_network(network, input=spec, architecture="Tied", source="python", require_map=False)
        written = load(encode_weights(classifier))
        assert all(torch.equal(written[name], tensor) for name, tensor in network.state_dict().items())
