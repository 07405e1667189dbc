import runpy
from pathlib import Path

from PIL import Image

from keyed_xai.models import load_classifier

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_demo_network_script_writes_a_network_that_loads(tmp_path, capsys):
    script = runpy.run_path(str(EXAMPLES / "train_demo_network.py"))
    target = tmp_path / "network.safetensors"
    script["main"](["--data", "builtin", "--epochs", "1", "--limit", "128", "-o", str(target)])
    assert "test accuracy" in capsys.readouterr().out
    classifier = load_classifier(target)
    assert (classifier.architecture, classifier.input.height, classifier.classes) == ("SmallResNet", 32, 10)


def test_trigger_gallery_is_a_small_picture(tmp_path):
    target = tmp_path / "gallery.png"
    runpy.run_path(str(EXAMPLES / "make_trigger_gallery.py"))["main"](["-o", str(target)])
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
    assert target.stat().st_size < 300_000
