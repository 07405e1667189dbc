import json

import pytest
import torch
from click.testing import CliRunner

from keyed_xai.artifacts.documents import validate
from keyed_xai_benchmarks.filters import measure_nashville_speed
from keyed_xai_cli.main import main


def test_speed_of_both_filters_is_measured():
    found = measure_nashville_speed(images=2, side=64, repeats=3)
    assert found.keys() == {"ours", "pilgram", "ratio", "threads"}
    assert found["pilgram"] > 0
    assert found["ratio"] == pytest.approx(found["ours"] / found["pilgram"])
    assert found["threads"] == torch.get_num_threads()


def test_command_writes_json():
    arguments = ["bench", "nashville", "--images", "2", "--size", "32", "--repeats", "1", "--json", "-"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    validate(document, "bench-figures", origin="standard output")
    assert document["rows"][0]["pilgram"] > 0
    assert document["settings"] == {"images": 2, "size": 32, "repeats": 1}
