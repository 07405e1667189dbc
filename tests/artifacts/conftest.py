"""The folder of a protected model, for tests that read or change it."""

import pytest

from tests.exported import export_model
from tests.licensed import write_example


@pytest.fixture
def model(tmp_path):
    return write_example(tmp_path / "m.keyed", extra_files={"report.html": b"<p>", "pictures/a.png": b"png"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("export"))
