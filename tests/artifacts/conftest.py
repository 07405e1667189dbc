"""The folder of a protected model, for tests that read or change it."""

import pytest

from tests.licensed import write_example


@pytest.fixture
def model(tmp_path):
    return write_example(tmp_path / "m.keyed", extra_files={"report.html": b"<p>", "pictures/a.png": b"png"})
