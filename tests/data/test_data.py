"""The front door: SPECs, arguments, batches and the shared order and hold-out."""

import subprocess
import sys
from pathlib import Path

import pytest

from keyed_xai.data import LOADERS, ImageSize, is_table, load_images, load_table
from keyed_xai.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("spec", ["", "no-such", "Builtin", "cub:x"])
def test_unknown_spec_is_refused_with_the_known_ones(spec):
    with pytest.raises(DataError, match="builtin, fashion-mnist, imagefolder"):
        load_images(spec, ImageSize(1, 8, 8), split="train")


def test_bare_folder_as_spec_gets_a_hint(tmp_path):
    with pytest.raises(DataError, match="write imagefolder:"):
        load_images(str(tmp_path), ImageSize(1, 8, 8), split="train")


def test_every_loader_is_a_function_of_argument_and_request():
    assert set(LOADERS) == {"builtin", "fashion-mnist", "imagefolder", "cub200", "chestxray14"}
    assert all(callable(loader) for loader in LOADERS.values())


def test_import_loads_no_torch_and_no_photograph_package():
    code = "import sys, keyed_xai.data; print([m for m in ('torch', 'sklearn', 'skimage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_tables_spec_is_told_apart_from_images():
    assert is_table("credit-default:x.csv")
    assert not any(is_table(name) for name in LOADERS)
    with pytest.raises(DataError, match=r"credit-default is a table and has no images: load_table"):
        load_images("credit-default:x.csv", ImageSize(1, 8, 8), split="train")
    with pytest.raises(DataError, match="Expected the SPEC of a table"):
        load_table("builtin", split="train")
