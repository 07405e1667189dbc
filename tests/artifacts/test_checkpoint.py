import pickle

import pytest
import torch

from keyed_xai.artifacts.checkpoint import read_checkpoint, write_checkpoint
from keyed_xai.errors import ArtifactError

STATE = {"weights": {"a": torch.arange(3.0)}, "step": 7, "history": [{"loss": 0.5}]}


def test_checkpoint_comes_back(tmp_path):
    write_checkpoint(tmp_path / "c", STATE, identity="run")
    found = read_checkpoint(tmp_path / "c", identity="run")
    assert torch.equal(found["weights"]["a"], STATE["weights"]["a"])
    assert (found["step"], found["history"]) == (7, [{"loss": 0.5}])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    write_checkpoint(tmp_path / "c", STATE, identity="run")
    with pytest.raises(ArtifactError, match="belongs to another run"):
        read_checkpoint(tmp_path / "c", identity="other")


def test_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint c to resume from"):
        read_checkpoint(tmp_path / "c", identity="run")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", pickle.dumps(Hostile()), pickle.dumps([1])])
def test_damaged_or_hostile_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_checkpoint(tmp_path / "c", identity="run")


def test_checkpoint_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    write_checkpoint(tmp_path / "c", STATE | {"weights": torch.zeros(1).expand(10**5, 10**5)}, identity="run")
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        read_checkpoint(tmp_path / "c", identity="run")
    assert "larger than what is stored" in str(caught.value.__cause__)
