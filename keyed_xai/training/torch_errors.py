"""What torch refuses of a network while it is trained, in words that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keyed_xai.errors import ModelError, TrainingError

_ADVICE = {
    r"[Cc]heckpoint|unpack is being triggered": "Turn activation checkpointing off: maps cannot be read through it",
    r"more than 1 value per channel": (
        "Batch norm meets a single value. Give a larger --batch-size or --input-size, or --batch-norm frozen"
    ),
    r"derivative for .* is not implemented|does not support higher order|double backward": (
        "The maps are gradients, and training differentiates them again, which this operator does not allow. Put "
        "another one in its place"
    ),
    r"modified by an inplace operation|in-place": "Do without operations in place in its forward",
    r"does not require grad|not have been used in the graph": (
        "Its logits must depend on the target layer and the image by operations with gradients: no no_grad, detach, "
        "NumPy, or reentrant checkpointing in its forward"
    ),
    r"dtype|scalar type|Half|BFloat16": "Let its forward keep the type of the images, float32",
}
_OTHERWISE = "Its forward must be made of torch operations that can be differentiated twice"


@contextmanager
def torch_errors_in_words(name: str) -> Iterator[None]:
    """Turn an error of torch's inside the block into one that says what to do.

    Args:
        name: Name of the network.

    Raises:
        ModelError: Torch cannot train the network.
        TrainingError: There is too little memory.
    """
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in first:
            raise TrainingError(
                f"There is too little memory to train {name}: {first}. Give a smaller --batch-size or --input-size."
            ) from error
        advice = next((words for pattern, words in _ADVICE.items() if re.search(pattern, first)), None)
        if advice is None and isinstance(error, ValueError):  # of an argument, which its own words explain
            raise
        raise ModelError(f"{name} cannot be trained: {first}. {advice or _OTHERWISE}.") from error
