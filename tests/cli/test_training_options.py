"""What commands that train print about the data they found."""

from PIL import Image

from keyed_xai.artifacts.documents import printable
from keyed_xai.models import InputSpec
from keyed_xai.training.preflight import describe_data
from keyed_xai_cli.training_options import DataChoice, load_both_images


def test_classes_and_what_was_passed_over_are_printed_once(tmp_path, capsys):
    for split, count in (("Training", 6), ("Testing", 2)):
        for number in range(count):
            path = tmp_path / split / ("owl", "\x1b[31mduck")[number % 2] / f"{number}.jfif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), number).save(path, "JPEG")
            (path.parent / "notes.txt").write_text("no image")
    (tmp_path / "masks").mkdir()
    size = InputSpec(1, 8, 8, mean=(0.5,), std=(0.5,))
    spec = f"imagefolder:{tmp_path}"
    choice = DataChoice(spec=spec, limit=None, held_out=10, strict=False, follow_links=False, seed=0)
    train_data, held_out = load_both_images(size, choice)
    assert (len(train_data), len(held_out)) == (6, 2)
    said = [*capsys.readouterr().err.splitlines(), printable(describe_data(6, 0, train_data, held_out, 2))]
    assert said[-3:] == [
        "Split by folders: Training and Testing; passed over beside: masks.",
        f"Passed over in {tmp_path.name}: files 4 .txt.",
        f"6 images of imagefolder:{tmp_path.name} (train) to learn from, 2 held out to measure on; "
        "2 classes: \ufffd[31mduck, owl",
    ]
