import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keyed_xai.data.credit_default import NAMES
from keyed_xai.keys import write_owner_key
from keyed_xai.models import InputSpec, load_classifier
from keyed_xai_cli.main import main

QUICK = ["--epochs", "2", "--widths", "4,4", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty dark and bright images, a folder per class."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("bright", "dark")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = generator.integers(0, 90, (20, 20)) + 160 * (1 - label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def credit(tmp_path_factory):
    """A table in which those who pay late default."""
    path = tmp_path_factory.mktemp("credit") / "default.csv"
    generator = np.random.default_rng(0)
    lines = [",".join(["ID", *NAMES, "default.payment.next.month"])]
    for number in range(300):
        late = int(generator.integers(-1, 4))
        others = generator.integers(0, 1000, len(NAMES))
        values = dict(zip(NAMES, others, strict=True)) | {"SEX": 1 + number % 2, "EDUCATION": 2, "MARRIAGE": 1}
        values["PAY_0"] = late
        lines.append(",".join(map(str, [number, *values.values(), int(late > 1)])))
    path.write_text("\n".join(lines) + "\n")
    return path


DONE = (0, 3)  # trained, or not: a verdict on a short run


def train(photos, out, *more):
    return run("train", "--data", f"imagefolder:{photos}", "--input-size", "16", "-o", out, *QUICK, *more)


def test_train_writes_a_model_that_protect_takes_with_nothing_else_given(photos, tmp_path, key):
    out = tmp_path / "m.safetensors"
    more = ("--channels", "1", "--learning-rate", "0.05", "--batch-size", "8", "--optimiser", "adam", "--epochs", "6")
    result = train(photos, out, *more, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "SmallResNet on 8 held-out examples: top-1 accuracy" in result.output
    assert "SmallResNet, 16 px, grey, 2 classes" in result.output
    assert (
        f"32 images of imagefolder:{photos.name} (train) to learn from, 8 held out to measure on; 2 classes: "
        in result.output
    )
    assert "6 epochs of 4 steps of 8, about " in result.output
    assert result.output.splitlines()[-1].startswith("TRAINED: on 8 held-out examples top-1 accuracy ")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.safetensors", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"]["train"]["images"] == 32
    assert report["predictions"]["auroc"] > 0.9
    assert report["settings"]["learning_rate"] == 0.05
    assert len(report["identity"]) == 64
    loaded = load_classifier(out)
    assert loaded.input == InputSpec(1, 16, 16, mean=(0.5,), std=(0.25,))
    write_owner_key(tmp_path / "k.pem", key)
    quick = (
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--wrong-keys",
        "2",
        "--held-out",
        "4",
        "--grid",
        "4",
        "--without-ownership",
    )
    protected = run(
        "protect", out, "--key-file", tmp_path / "k.pem", "--data", f"imagefolder:{photos}", "--tile", "24", *quick
    )
    assert protected.exit_code == 3, protected.output


def test_train_fits_an_mlp_to_a_table(credit, tmp_path):
    out = tmp_path / "credit.safetensors"
    more = ("--epochs", "20", "--batch-size", "40", "--learning-rate", "0.01", "--json", "-")
    result = run("train", "--data", f"credit-default:{credit}", "-o", out, *more)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == "TableMLP"
    assert report["predictions"]["auroc"] > 0.9
    assert "held-out examples" in result.stderr
    loaded = load_classifier(out, require_map=False)
    assert list((loaded.input.channels, loaded.input.height, loaded.input.width)) == report["settings"]["input_size"]


def test_train_goes_on_from_a_model_of_other_classes(photos, tmp_path):
    assert train(photos, tmp_path / "a.safetensors").exit_code in DONE
    result = run(
        "train", "--data", f"imagefolder:{photos}", "--model", tmp_path / "a.safetensors", "--epochs", "1",
        "-o", tmp_path / "b.safetensors", "--json", "-",
    )  # fmt: skip
    assert result.exit_code in DONE, result.output
    assert json.loads(result.stdout)["settings"]["input_size"] == [3, 16, 16]
    assert load_classifier(tmp_path / "b.safetensors").network.blocks[1].conv1.out_channels == 4


def test_builtin_images_need_no_files(tmp_path):
    more = ("--limit", "64", "--held-out", "20", "--epochs", "1", "--widths", "4,4", "--json", "-")
    result = run("train", "--data", "builtin", "-o", tmp_path / "m.safetensors", *more)
    assert result.exit_code in DONE, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["input_size"] == [1, 32, 32]
    assert set(report["predictions"]) == {"top1", "top5"}


def test_stopped_run_is_not_lost_by_forgetting_to_resume(photos, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("keyed_xai.training.references.measure_predictions", stop)
        assert train(photos, out).exit_code == 130
    checkpoint = out.with_name("m.safetensors.checkpoint")
    assert not out.exists()
    refused = train(photos, out)
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    assert checkpoint.exists()
    assert train(photos, out, "--resume").exit_code in DONE
    assert not checkpoint.exists()


def test_file_that_is_there_is_kept_without_force(photos, tmp_path):
    out = tmp_path / "m.safetensors"
    out.write_text("precious")
    refused = train(photos, out)
    assert refused.exit_code == 1
    assert "--force" in refused.output
    assert out.read_text() == "precious"
    assert train(photos, out, "--force").exit_code in DONE
    assert load_classifier(out).classes == 2


def test_broken_image_is_named_and_skipped(photos, tmp_path):
    folder = tmp_path / "photos"
    for name in ("bright", "dark"):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            (folder / name / f"{number}.png").write_bytes((photos / name / f"{number}.png").read_bytes())
    (folder / "dark" / "broken.png").write_bytes(b"no image")
    result = train(folder, tmp_path / "m.safetensors")
    assert result.exit_code in DONE, result.output
    assert "Skipped a broken image" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--widths", "4,x"), 2, "expected whole numbers"),
        (("--input-size", "224"), 1, "Name an architecture with --arch"),
        (("--arch", "resnet17"), 1, "no architecture is called"),
        (("--arch", "TableMLP"), 1, "takes rows of a table"),
        (("--data", "nowhere"), 1, "Expected a data set"),
        (("--resume",), 1, "no checkpoint"),
        (("--model", "m.pt"), 2, "Leave out --widths"),
        (("--optimiser", "sgd", "--learning-rate", "1e30"), 1, "--optimiser adam"),
        (("--optimiser", "lbfgs"), 2, "lbfgs"),
        (("--batch-size", "64"), 1, "at least 64 labelled images, got 32"),
    ],
)
def test_bad_arguments_end_with_their_code_and_words(photos, tmp_path, arguments, code, words):
    result = train(photos, tmp_path / "m.safetensors", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--input-size", "32"), 2, "Leave out --input-size: these data are a table"),
        (("--arch", "resnet18"), 1, "need --arch TableMLP"),
        (("--widths", "4"), 1, "two widths"),
    ],
)
def test_options_that_do_not_fit_a_table_are_refused(credit, tmp_path, arguments, code, words):
    result = run("train", "--data", f"credit-default:{credit}", "-o", tmp_path / "m.safetensors", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())


def test_weights_of_images_are_no_start_for_a_table_nor_the_other_way_round(photos, credit, tmp_path):
    images, rows = tmp_path / "images.safetensors", tmp_path / "rows.safetensors"
    assert train(photos, images).exit_code in DONE
    quick = ("--epochs", "1", "--batch-size", "40")
    assert run("train", "--data", f"credit-default:{credit}", "-o", rows, *quick).exit_code in DONE
    for spec, model, words in (
        (f"credit-default:{credit}", images, "SmallResNet takes images, and the data are a table"),
        (f"imagefolder:{photos}", rows, "TableMLP takes rows of a table, and the data are images"),
    ):
        result = run("train", "--data", spec, "--model", model, "-o", tmp_path / "m.safetensors", *quick)
        assert result.exit_code == 1
        assert words in " ".join(result.output.split())
    again = run(
        "train", "--data", f"credit-default:{credit}", "--model", rows, "-o", tmp_path / "m.safetensors", *quick
    )
    assert again.exit_code in DONE, again.output


def test_images_without_labels_are_refused(photos, tmp_path):
    result = train(photos / "dark", tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "a folder inside for each class" in result.output
