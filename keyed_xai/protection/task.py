"""What an owner key teaches a model."""

from collections.abc import Callable

from torch import Tensor

from keyed_xai.decoys import boundary_decoy, signature_decoy
from keyed_xai.keys import OwnerKey
from keyed_xai.models import Classifier
from keyed_xai.saliency.pooled import check_cells, make_view
from keyed_xai.training.batches import Task
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import TriggerFamily, derive_trigger


def make_keyed_task(
    classifier: Classifier,
    key: OwnerKey,
    family: TriggerFamily,
    *,
    interpreters: tuple[str, ...],
    grid: tuple[int, int] | None = None,
    decoy: str = "signature",
) -> Task:
    """Return the task that closes a classifier's maps to everybody without a key.

    Args:
        classifier: The reference model.
        key: The owner's key.
        family: Family of its trigger.
        interpreters: Interpreters whose maps are closed.
        grid: Rows and columns that maps are compared on; None takes the target layer's, at most 8 x 8.
        decoy: What closed maps show, a name in DECOYS.

    Raises:
        ModelError: The target layer has too few cells for a decoy.
    """
    view = make_view(classifier, interpreters, grid)
    check_cells(view, "a decoy")
    make_decoy: dict[str, Callable[[str], Tensor | None]] = {
        "signature": lambda name: signature_decoy(key.public, name, view.grid),
        "boundary": lambda _: boundary_decoy(view.grid),
        "nontargeted": lambda _: None,
    }
    objective = Objective(
        decoys={name: make_decoy[decoy](name) for name in interpreters}, weights=dict.fromkeys(interpreters, 1.0)
    )
    return Task(trigger=derive_trigger(key, family), family=family, view=view, objective=objective)
