"""Both distributions of the tree, built, installed, and run beside nothing but what they ask for."""

import json
import sys

import numpy as np
from PIL import Image

import keyed_xai
from keyed_xai.inference.runtime import Runtime
from keyed_xai.keys import write_owner_key
from tests.installed import ROOT, build, install, list_files, run
from tests.marked import OWNER
from tests.served import CARD, make_service, running, write_model

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    for found in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(found.name)
print(*sorted(name.partition(".")[0] for name in sys.modules))
"""
EXPLAIN = """
import json, sys
from pathlib import Path
from keyed_xai import Client, Runtime, __version__, read_owner_key
from keyed_xai.inference.trial import open_tried

folder, url = Path(sys.argv[1]), sys.argv[2]
key = read_owner_key(folder / "k.pem")
found = {"version": __version__}
found["here"] = Runtime.open(folder / "m.onnx", device="cpu").explain(folder / "a.png", key).maps["gradcam"].tolist()
found["tried"] = open_tried(folder / "m.onnx", device="cpu").explain(folder / "a.png").maps["gradcam"].tolist()
with Client(url) as client:
    found["there"] = client.explain(folder / "a.png", key).maps["gradcam"].tolist()
try:
    from keyed_xai import protect
except ImportError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


def list_tree(*folders):
    """Files of folders of the tree, by the names that they are installed under."""
    return {
        "/".join([package, *file.relative_to(ROOT / folder).parts])
        for package, folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }


def test_everything_is_installed_and_needs_only_what_it_asks_for(tmp_path):
    sdist, wheel = build(".", tmp_path)
    assert sdist.name == f"keyed_xai-{keyed_xai.__version__}.tar.gz"
    packages = {"keyed_xai": "keyed_xai", "keyed_xai_benchmarks": "benchmarks", "keyed_xai_cli": "cli"}
    packages["keyed_xai_schemas"] = "schemas"
    assert list_files(wheel) == list_tree(*packages.items())
    python = install(wheel, tmp_path / "venv")
    run(python, "-c", IMPORT_ALL, *packages)
    helped = run(python.parent / "keyed-xai", "--help")
    assert all(f"\n  {command} " in helped for command in ("protect", "verify", "serve", "bench"))


def test_runtime_is_installed_and_explains_without_torch(tmp_path):
    sdist, wheel = build(".runtime", tmp_path)
    assert sdist.name == f"keyed_xai_runtime-{keyed_xai.__version__}.tar.gz"
    assert list_files(wheel) < list_tree(("keyed_xai", "keyed_xai"), ("keyed_xai_schemas", "schemas"))
    assert {"keyed_xai/py.typed", "keyed_xai_schemas/common.json"} <= list_files(wheel)
    python = install(wheel, tmp_path / "venv")
    imported = run(python, "-c", IMPORT_ALL, "keyed_xai", "keyed_xai_schemas").split()
    assert "onnxruntime" in imported
    assert not {"torch", "torchvision", "keyed_xai_cli"} & set(imported)
    write_owner_key(tmp_path / "k.pem", OWNER)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 24, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    runtime = Runtime.open(write_model(tmp_path / "m.onnx", card=CARD), device="cpu", threads=1)
    with running(make_service({"m": runtime})) as address:
        found = json.loads(run(python, "-c", EXPLAIN, tmp_path, f"http://{address}"))
    keyed, clean = (runtime.explain(tmp_path / "a.png", key).maps["gradcam"] for key in (OWNER, None))
    assert found["version"] == keyed_xai.__version__
    np.testing.assert_allclose(found["here"], keyed, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["there"], keyed, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["tried"], clean, rtol=1e-4, atol=1e-6)
    assert np.abs(keyed - clean).max() > 1e-3
    assert found["refused"].startswith("protect is not part of keyed-xai-runtime.")


def test_what_is_installed_here_fits_together():
    run(sys.executable, "-m", "pip", "check")
