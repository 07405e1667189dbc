"""Reading a model file without trusting it: PyTorch's own format with ``weights_only``, and safetensors.

Nothing in a file is ever run, except a pickled module with ``allow_pickle=True``.
"""

import argparse
import io
import json
import pickle
import pickletools
import re
import reprlib
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.models.contents import WRAPPERS, LeftOut, LeftOutMapping, choose_set, find_sets, is_averaged, is_wanted
from keyed_xai.models.hub import read_hub_config

CARD_KEY = "keyed_xai_card"
"""Name of the card, as JSON, in a safetensors file's metadata. In a ``.pt`` file the card is the entry ``card``."""
_FOLDER_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")
# What PyTorch's loader and zipfile have been seen to raise on damaged files.
LOAD_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, EOFError,
    OSError, ImportError, OverflowError, MemoryError, AssertionError, NotImplementedError, SyntaxError, ArithmeticError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip
_ZIP_START = b"PK\x03\x04"
_MOST_TENSORS = 10_000
_LARGEST_HEADER = 4 * 1024 * 1024  # bytes of a safetensors header; some 100 for each tensor
_LARGEST_PICKLE = 16 * 1024 * 1024  # bytes of the objects in a .pt file, tensors' numbers not counted
_LARGEST_CARD = 4 * 1024 * 1024  # letters
_LARGEST_DIRECTORY = 4 * 1024 * 1024  # bytes of a zip archive's list of files
_SEE_ZIP64 = 2**32 - 1
_MOST_OBJECTS = 2**25
_LONGEST_NAME = 500
_MARK = -1
_OPERATING = {"copy_reg", "commands"}  # standard library of Python 2, which no placeholder stands for
_PLAIN = {"pathlib", "datetime", "collections", "decimal", "uuid", "types", "enum"}  # standard library, and harmless
_PLAIN_BUILTINS = {
    "getattr",  # of an enum's member
    "object", "list", "dict", "tuple", "set", "frozenset", "int", "float", "bool", "str", "slice", "range",
}  # fmt: skip
_PICKLES = 5  # in torch's old format, before the numbers; the data.pkl of its new one is a single pickle
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
_RESAVE = (
    "Save the weights alone, torch.save(model.state_dict(), 'model.pt') or safetensors.torch.save_file, and give that "
    "file (with --arch if the architecture is not recognised)"
)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """What a model file holds: tensors, or a pickled module, and what it says about itself.

    Attributes:
        tensors: Names as in the file, wrapper prefixes and all; float32 where they were floats. Empty for a module.
        module: A pickled module, in float32.
        card: Our own card, as it came: not checked.
        hints: Architecture names that training scripts leave beside the weights: not trusted.
        notes: Sentences for the user about which of several sets of weights these are.
        chosen: Whether they are the set that was asked for by name.
    """

    tensors: dict[str, Tensor]
    module: nn.Module | None = None
    card: Mapping[str, object] | None = None
    hints: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    chosen: bool = False


def read_model_file(path: str | Path, *, allow_pickle: bool = False, weights: str | None = None) -> ModelFile:
    """Return what is in a model file or a folder with one.

    Args:
        path: A state dict saved by `torch.save`, alone or in a checkpoint with much besides; a safetensors file; or a
            folder with ``model.safetensors``, ``model.pt`` or ``pytorch_model.bin``, perhaps with timm's
            ``config.json``, which counts as a card. Recognised by content, not by name.
        allow_pickle: Also take a pickled module. **Runs code from the file.**
        weights: Which of several sets of weights: ``ema`` for averaged ones, or the name of an entry.

    Raises:
        ModelError: The file is missing, empty, damaged, of another kind, or would run code.
    """
    file = _find_file(Path(path))
    try:
        start = file.read_bytes()[:16] if file.stat().st_size < 16 else _first_bytes(file)
    except OSError as error:
        raise ModelError(f"the model file {file.name} cannot be read: {error.strerror}.") from error
    if not start:
        raise ModelError(f"the model file {file.name} is empty. Save or download it again.")
    if _is_safetensors(start, file):
        found = _read_safetensors(file)
    else:
        _check_kind(file, start)
        found = _sort_out(_load_pickled(file, allow_pickle=allow_pickle), file.name, weights)
    _check_tensors(found.module.state_dict() if found.module is not None else found.tensors, file.name)
    if Path(path).is_dir() and found.card is None:
        card, hints = read_hub_config(Path(path))
        return replace(found, card=card or None, hints=(*found.hints, *hints))
    return found


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(16)


def _find_file(path: Path) -> Path:
    if (path / "card.json").is_file():
        raise ModelError(
            f"{path.name} is the folder of a protected model. Give the original weights; to run the protected model, "
            "use explain, or keyed_xai.artifacts.opening.open_model in Python."
        )
    if path.is_dir():
        inside = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if inside:
            return inside[0]
        raise ModelError(f"the folder {path.name} holds no {', '.join(_FOLDER_FILES)}: give the model file itself.")
    if not path.is_file():
        raise ModelError(f"there is no model file {path}. Check the path.")
    return path


def _is_safetensors(start: bytes, file: Path) -> bool:
    """Return whether a file is safetensors: the header's length in eight bytes, then JSON."""
    if file.suffix == ".safetensors":
        return True
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size


def _read_safetensors(file: Path) -> ModelFile:
    _check_header(file)
    try:
        tensors = load_file(file)
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (safetensors.SafetensorError, *LOAD_ERRORS) as error:
        raise ModelError(
            f"the safetensors file {file.name} is damaged or cut short: {error}. Save or download it again."
        ) from error
    card = metadata.get(CARD_KEY)
    return ModelFile(
        tensors=_as_float32(tensors, file.name), card=None if card is None else _parse_card(card, file.name)
    )


def _check_header(file: Path) -> None:
    """Refuse a safetensors header that is too long, or names too many tensors, before the library reads it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ModelError(
                f"the header of {file.name} has {length} bytes, expected at most {_LARGEST_HEADER}. The file is "
                "damaged, or holds more than a classifier's weights."
            )
        count = stream.read(length).count(b'"data_offsets"')
    if count > _MOST_TENSORS:
        raise _too_many(count, file.name)


def _too_many(count: int, name: str) -> ModelError:
    return ModelError(f"{name} holds {count} tensors, expected at most {_MOST_TENSORS}. Give the weights alone.")


def _parse_card(text: str, name: str) -> Mapping[str, object]:
    if len(text) > _LARGEST_CARD:
        raise ModelError(f"the card in {name} has {len(text)} letters, expected at most {_LARGEST_CARD}. Remove it.")
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"the card in {name} ({CARD_KEY}) is not JSON: {error}. Remove it or write it again."
        ) from error
    if not isinstance(card, dict):
        raise ModelError(f"the card in {name} must be a JSON object, but is a {type(card).__name__}.")
    return card


def _check_kind(file: Path, start: bytes) -> None:
    """Refuse what is no pickle: TorchScript and exported programs (zip archives too), ONNX, HDF5, pages of text."""
    if start.startswith((b"\x89HDF", b"<!", b"<htm", b"version https://git", b"\x08\x03\x12", b"\x08\x07\x12")):
        raise ModelError(
            f"{file.name} is no PyTorch file (HDF5, ONNX, a web page or a Git LFS pointer). Give a state dict saved by "
            "torch.save, or a safetensors file."
        )
    if not start.startswith(_ZIP_START):
        return
    names = [member.filename for member in _list_archive(file)]
    inner = {"/".join(name.split("/")[1:]) for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ModelError(
            f"{file.name} is a TorchScript archive: it holds compiled code, whose layers can be neither hooked for "
            f"saliency maps nor trained safely. {_RESAVE}."
        )
    if any("exported_program" in name for name in names) or any(name.startswith("models/") for name in inner):
        raise ModelError(f"{file.name} is an exported program (torch.export): it cannot be trained. {_RESAVE}.")


def _list_archive(file: Path) -> list[zipfile.ZipInfo]:
    """Return what is in a zip archive.

    Raises:
        ModelError: It is damaged, or its list is longer than any model's.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 2**16 - 22))
            end = stream.read()
        (size,) = struct.unpack_from("<I", end, end.rindex(b"PK\x05\x06") + 12)
        if size == _SEE_ZIP64:
            (size,) = struct.unpack_from("<Q", end, end.rindex(b"PK\x06\x06") + 40)
        if size > _LARGEST_DIRECTORY:
            raise ModelError(f"{file.name} lists its tensors in {size} bytes, expected at most {_LARGEST_DIRECTORY}.")
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise ModelError(f"{file.name} is damaged or cut short: {error}. Save or download it again.") from error


def load_weights(file: Path, *, leave_out: bool = False) -> object:
    """Return what `torch.save` wrote, tensors and plain values: nothing in the file is run.

    Sizes that the file names are compared with its own before anything is unpacked, and again with the tensors made.

    Args:
        file: The file to read.
        leave_out: Put a `LeftOut` where there is an object of another class than tensors' and plain values', such as
            one of NumPy's scalars, instead of refusing the file. What names functions of the system is refused anyway.

    Raises:
        ModelError: The file says that it holds more than it does.
        Exception: Whatever PyTorch's loader raises on damaged files and on those that would run code.
    """
    names = _check_pickle(file)
    others = [(_stand_in(name), name) for name in names if leave_out and _is_left_out(name)]
    # Training scripts of torchvision and timm keep their options, a Namespace of plain values, beside the weights.
    # PyTorch warns of sparse tensors and new pickle protocols, which end in a ModelError anyway.
    # What PyTorch itself knows as harmless comes before `others`.
    with torch.serialization.safe_globals([argparse.Namespace, *others]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    _check_storages(loaded, file)
    return loaded


def _is_left_out(name: str) -> bool:
    """Return whether a class may stand beside weights: of other packages, or a harmless one of Python's own."""
    package, _, rest = name.partition(".")
    if package == "builtins":
        return rest in _PLAIN_BUILTINS
    return package in _PLAIN or package not in sys.stdlib_module_names | _OPERATING


def _stand_in(name: str) -> type[LeftOut]:
    return LeftOutMapping if name.endswith(("Dict", "dict")) else LeftOut


def _check_pickle(file: Path) -> set[str]:
    """Return the classes and functions that a pickle names.

    Raises:
        ModelError: It would unpack to more than the file holds: packed members, many objects, arrays of zeros.
    """
    with file.open("rb") as stream:
        pickled = stream.read(_LARGEST_PICKLE)
    if pickled.startswith(_ZIP_START):
        members = _list_archive(file)
        if any(member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size
               for member in members) or sum(member.file_size for member in members) > file.stat().st_size:  # fmt: skip
            raise ModelError(
                f"{file.name} is a packed archive, or holds more than its own size: torch.save writes neither. Unpack "
                "it and save it again."
            )
        objects = [member for member in members if member.filename.endswith("data.pkl")]
        if len(objects) != 1 or objects[0].file_size > _LARGEST_PICKLE:
            raise ModelError(
                f"{file.name} must hold one data.pkl of at most {_LARGEST_PICKLE} bytes, as torch.save writes it. "
                f"{_RESAVE}."
            )
        with zipfile.ZipFile(file) as archive:
            pickled = archive.read(objects[0])
    names = _check_tangle(pickled, file.name)
    if b"bytearray" in pickled:  # the one type that is allowed and takes up whatever length it names
        raise ModelError(f"{file.name} holds a bytearray, expected tensors and plain values. {_RESAVE}.")
    return names


def _check_tangle(pickled: bytes, name: str) -> set[str]:
    """Refuse objects that hold one another so often that to hash or print one would never end.

    A tuple of two, each the same tuple of two, and so on for 60 floors, is 300 bytes: as a dictionary's key it is
    walked 2^60 times. The pickle is read without being run, and each object counts what it would have written out.

    Returns:
        The classes and functions that it names.
    """
    names: set[str] = set()
    stack: list[int] = []
    memo: dict[int, int] = {}
    stream = io.BytesIO(pickled)
    try:
        for _ in range(_PICKLES if pickled else 0):
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL" and len(str(argument)) > _LONGEST_NAME:  # PyTorch searches it for minutes
                    raise ModelError(
                        f"{name} names a class in {len(str(argument))} letters, expected {_LONGEST_NAME} at most."
                    )
                if operation.name == "GLOBAL":
                    names.add(re.sub(r"^__builtin__\b", "builtins", str(argument).replace(" ", ".")))  # as Python 2's
                if _step(operation, argument, stack, memo) > _MOST_OBJECTS:
                    raise ModelError(f"{name} holds objects in one another more than {_MOST_OBJECTS} times. {_RESAVE}.")
            if stream.tell() == len(pickled):
                break
    except LOAD_ERRORS as error:
        raise _no_model_file(name, error) from error
    return names


def _step(
    operation: pickletools.OpcodeInfo,
    argument: Any,  # noqa: ANN401 - whatever the opcode takes
    stack: list[int],
    memo: dict[int, int],
) -> int:
    """Do to sizes what a pickle's opcode does to objects; return the last one's size."""
    kind, before = operation.name, operation.stack_before
    if kind.endswith("PUT"):
        memo[argument] = stack[-1]
    elif kind == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif kind.endswith("GET"):
        stack.append(memo[int(argument)])
    elif kind == "MARK":
        stack.append(_MARK)
    else:
        start = len(stack) - len(before)
        if pickletools.markobject in before:
            marks = (place for place in range(len(stack) - 1, -1, -1) if stack[place] == _MARK)
            start = next(marks, 0) - before.index(pickletools.markobject)
        size = 1 + sum(max(0, each) for each in stack[start:])
        stack[start:] = [size] * len(operation.stack_after)
    return stack[-1] if stack else 0


def _check_storages(loaded: object, file: Path) -> None:
    """Refuse tensors that are larger than what the file stores for them, before any number is touched."""
    largest, count = file.stat().st_size, 0
    storages: dict[int, int] = {}
    for tensor in _tensors_in(loaded):
        count += 1
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            continue  # refused where it is used
        stored = tensor.untyped_storage()
        storages[stored.data_ptr()] = stored.nbytes()
        if tensor.numel() * tensor.element_size() > stored.nbytes() or sum(storages.values()) > largest:
            raise ModelError(
                f"a tensor of shape {list(tensor.shape)} in {file.name} is larger than what is stored for it. "
                f"{_RESAVE}."
            )
    if count > _MOST_TENSORS:
        raise _too_many(count, file.name)


def _tensors_in(loaded: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples, each once."""
    waiting, seen = [loaded], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, argparse.Namespace):
            waiting.append(vars(value))


def _load_pickled(file: Path, *, allow_pickle: bool) -> object:
    """Load weights; where there are none but code, and the user allows it, whatever the pickle makes."""
    failure: Exception | None = None
    try:
        loaded = load_weights(file, leave_out=True)
        if not _is_code_instead(loaded):
            return loaded
    except LOAD_ERRORS as error:
        failure = error
    refused = _code_in(file)
    if refused and allow_pickle:
        return _run_pickle(file)
    if refused:
        raise ModelError(
            f"{file.name} is not weights alone but pickled Python objects ({', '.join(refused[:4])}): loading it "
            f"would run code from the file. {_RESAVE}. If you trust whoever made the file, --allow-pickle "
            "(allow_pickle=True in Python) loads it all the same."
        ) from failure
    raise _no_model_file(file.name, failure or ValueError()) from failure


def _is_code_instead(loaded: object) -> bool:
    """Return whether what stands in the place of weights is an object of a class that was not loaded."""
    if not isinstance(loaded, Mapping):
        return isinstance(loaded, LeftOut)
    sets = find_sets(loaded)
    wrapped = any(isinstance(value, LeftOut) for key, value in loaded.items() if key in WRAPPERS)
    return wrapped and not any(each.name for each in sets)


def _no_model_file(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} is no model file, or it is damaged or cut short ({type(error).__name__}). Expected a state dict saved "
        "by torch.save, or a safetensors file; save or download it again."
    )


def _run_pickle(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"the pickled objects in {file.name} cannot be restored ({type(error).__name__}: {error}). Their classes "
            f"must be importable where this runs. {_RESAVE}."
        ) from error


def _code_in(file: Path) -> list[str]:
    """Return the classes and functions that a pickle refers to, PyTorch's own last, read without running it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except LOAD_ERRORS:
        return []
    return sorted(names, key=lambda name: (name.startswith("torch."), name))


def _sort_out(loaded: object, name: str, weights: str | None) -> ModelFile:
    """Find the state dict, or the module, in what was loaded."""
    if isinstance(loaded, nn.Module):
        return ModelFile(tensors={}, module=_as_network(loaded, name))
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{name} holds a {type(loaded).__name__} and no state dict. {_RESAVE}.")
    card = loaded.get("card")
    hints = _hints(loaded)
    module = _module_in(loaded, weights)
    if module is not None:
        return ModelFile(tensors={}, module=_as_network(module, name), hints=hints)
    sets = find_sets(loaded)
    if not sets:
        raise ModelError(
            f"{name} holds no weights: expected tensor names to tensors, alone or under {', '.join(WRAPPERS[:3])}; "
            f"came entries {', '.join(map(reprlib.repr, list(loaded)[:4])) or '(none)'}. {_RESAVE}."
        )
    chosen, note = choose_set(sets, weights)
    return ModelFile(
        tensors=_as_float32(chosen.tensors, name),
        card=card if isinstance(card, Mapping) else None,
        hints=hints,
        notes=() if note is None else (note,),
        chosen=weights is not None and is_wanted(chosen.name, weights, averaged=chosen.averaged),
    )


def _module_in(loaded: Mapping[object, object], weights: str | None) -> nn.Module | None:
    """Return the pickled module asked for, or the one where weights usually are; there are some with allow_pickle."""
    modules = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, nn.Module)}
    if weights is not None:
        named = (value for key, value in modules.items() if is_wanted(key, weights, averaged=is_averaged(key)))
        return next(named, None)
    return next((modules[key] for key in WRAPPERS if key in modules), None)


def _hints(loaded: Mapping[object, object]) -> tuple[str, ...]:
    options = loaded.get("args")
    found = [loaded.get("arch"), getattr(options, "model", None), getattr(options, "arch", None)]
    return tuple(name for name in found if isinstance(name, str))


def _as_network(module: nn.Module, name: str) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{name} holds a TorchScript module, whose layers cannot be hooked. {_RESAVE}.")
    if isinstance(module, nn.DataParallel):
        module = module.module
    return module.float()


def _as_float32(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise ModelError(
                f"the tensor {key} in {name} is quantised, sparse, without data or of type {tensor.dtype}: only dense "
                "weights of usual types can be read. Save the model before it was quantised or compressed."
            )
    return {
        key: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach())
        for key, tensor in tensors.items()
    }


def _check_tensors(tensors: Mapping[str, Tensor], name: str) -> None:
    wrong = [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors in {name} hold NaN or infinite numbers ({', '.join(wrong[:4])}): the training that "
            "made them had diverged. Give a checkpoint from before that."
        )
