"""Saliency maps from a served model: `Client(url).explain(images, key)`.

Servers of the Open Inference Protocol are spoken to over HTTP: `keyed-xai serve`, NVIDIA Triton, KServe. The key stays
in this process: its trigger is put on the images here, and keyed images are all that is sent. Whoever receives those
can use them: talk to servers that you trust with them, over https.

What the model is, its server says: `keyed-xai serve` and Triton hand out the metadata of the ONNX file, the card in
them, as the parameter "keyed_xai" of the model's configuration. Others say input and output shapes only, and the
trigger is passed by hand. What a server answers is checked as anything untrusted is.
"""

import json
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote as quote_path

import numpy as np
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.documents import Document, parse_json, printable
from keyed_xai.artifacts.onnx_file import LARGEST_METADATA, METADATA_KEY, check_metadata
from keyed_xai.batches import batches
from keyed_xai.inference.images import (
    BATCH,
    LOGITS,
    MAP_PREFIX,
    Explained,
    Explainer,
    Floats,
    Interface,
    Picture,
    Target,
    choose_trigger,
)
from keyed_xai.inference.transport import Answer, Connection, ServerError, is_exposed, quote, split_model_url
from keyed_xai.keys import OwnerKey

__all__ = ["Client", "ServerError"]

_PIXELS: dict[str, np.dtype[Any]] = {"FP32": np.dtype(np.float32), "UINT8": np.dtype(np.uint8)}
_LARGEST_INPUT = 2**26  # numbers in one image
_LARGEST_TEXT = 2**24  # bytes of JSON around or instead of binary numbers; ten times that in memory
_LARGEST_ANSWER = 2**28  # bytes
_NO_SUCH_ROUTE = {"400", "404", "405", "501"}
_HEAD = "Inference-Header-Content-Length"
_NONSENSE = "something that is not the Open Inference Protocol"
# What the protocol's client raises when an answer is not what the protocol says.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
    InferenceServerException,
)


class Client(Explainer):
    """A served model. For one thread; close it, or use it in a `with` statement.

    What the server hands out is unsigned: it chooses with which family, amplitude and tile a key's trigger is sent to
    it. Pass `trigger=`, that of the card you hold (read_model_folder(path).card.trigger), to leave it no choice.

    Attributes of every `Explainer`, such as `interpreters` and `input_size`, and these:

    Attributes:
        url: Address of the server.
        model: Its name there.
        batch_size: Images in one request, at most.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: OwnerKey | None = None,
        trigger: TriggerParameters | None = None,
        timeout: float = 60.0,
        headers: Mapping[str, str] | None = None,
        batch_size: int = BATCH,
    ) -> None:
        """Ask the server what the model is.

        Args:
            url: Such as "https://models.example:8000", with a path if the server is below one; "/v2" and
                "/v2/models/NAME" may follow. Certificates are checked; SSL_CERT_FILE names further authorities.
            model: Its name on the server; the one in `url`, or the only one there by default.
            key: Used where `explain` is given none.
            trigger: Public parameters of the trigger; those that the server hands out by default.
            timeout: Seconds for one request with its answer, the waits for a busy server included.
            headers: Sent with every request, such as {"Authorization": "Bearer ..."}.
            batch_size: Images in one request, at most; fewer if the server takes fewer.

        Raises:
            ArtifactError: The model's metadata do not fit their schema.
            ServerError: The server cannot be reached, has no such model, or the model was not exported by keyed-xai.
            ValueError: An argument is malformed.
        """
        if batch_size < 1 or not timeout > 0:
            raise ValueError(f"expected batch_size and timeout above 0, got {batch_size} and {timeout}")
        url, named = split_model_url(url)
        if named is not None and model not in (None, named):
            raise ValueError(f"expected one model, got {named!r} in the url and model={model!r}")
        self.url, self._key = url, key
        self._server = _Server(url, Connection(url, timeout, headers or {}))
        self.model = model or named or self._server.find_only_model()
        inputs, outputs = self._server.read_tensors(self.model)
        config = self._server.read_config(self.model)
        metadata = _read_metadata(config, origin=f"the metadata of {self.model} on {url}")
        interface = _merge(_read_interface(inputs, outputs, self.model), metadata, self.model)
        super().__init__(replace(interface, trigger=trigger or interface.trigger), metadata)
        self.batch_size = min(batch_size, _read_limit(config) or batch_size)
        self._sizes: dict[str, tuple[int, ...]] = {}  # of the outputs seen so far
        self._target_sides = len(inputs["target"].shape) if self.takes_target else 0

    def __enter__(self) -> "Client":
        """Return this client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._server.connection.close()

    def explain(
        self,
        images: Picture | Sequence[Picture],
        key: OwnerKey | None = None,
        *,
        target: Target | None = None,
        interpreters: Sequence[str] | None = None,
    ) -> Explained:
        """Return predictions and maps of images; those of a protected model are right only with its key.

        Args:
            images: One or several; see `keyed_xai.inference.images`.
            key: Key whose trigger is put on the images, here; the client's by default, and without any what everybody
                sees.
            target: Class explained, for all images or each; None or -1 for the one predicted.
            interpreters: Interpreters whose maps are asked for; all by default.

        Raises:
            ArtifactError: The trigger cannot be made by this version.
            DataError: An image file cannot be read.
            ModelError: There is a key, and it is not known what trigger it makes.
            ServerError: The server cannot be reached, or does not answer as it should.
            ValueError: Images, targets or interpreters are not as described.

        Warns:
            UserWarning: Keyed images leave this machine over plain http.
        """
        names = self.interface.check_interpreters(interpreters)
        keyed = choose_trigger(key if key is not None else self._key, self.interface.trigger)
        if keyed is not None and is_exposed(self.url):
            warnings.warn("Keyed images go over plain http, where others can read them. Use https.", stacklevel=2)
        return self._explain(images, keyed, target, names, self.batch_size)

    def _run(self, images: NDArray[Any], target: NDArray[np.int64], interpreters: tuple[str, ...]) -> dict[str, Floats]:
        names = self.interface.name_outputs(interpreters)
        parts = batches(len(images), self.batch_size)
        answers = [self._request(images[part], target[part], names) for part in parts]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in names}

    def _request(self, images: NDArray[Any], target: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, Floats]:
        inputs = [_encode("image", images)]
        if self.takes_target:
            inputs.append(_encode("target", target.reshape(-1, *[1] * (self._target_sides - 1))))
        numbers = len(images) * (self.classes + (len(names) - 1) * math.prod(self.input_size[1:]))
        limit = min(_LARGEST_TEXT + numbers * np.dtype(np.float32).itemsize, _LARGEST_ANSWER)
        result = self._server.infer(self.model, inputs, names, limit)
        return {name: self._decode(result, name, len(images)) for name in names}

    def _complain(self, what: str) -> ServerError:
        return self._server.make_error(what)

    def _decode(self, result: InferResult, name: str, count: int) -> Floats:
        """Return an output of n images.

        Raises:
            ServerError: It is missing, or has another type or shape than it should.
        """
        try:
            found: NDArray[Any] | None = result.as_numpy(name)
        except _MALFORMED as error:
            raise self._server.make_error(f"a malformed {name}") from error
        if found is None:
            raise self._server.make_error(f"no {name}")
        misfit = self.interface.describe_misfit(name, found, count)
        if misfit is not None:
            raise self._server.make_error(misfit)
        if self._sizes.setdefault(name, found.shape[1:]) != found.shape[1:]:
            raise self._server.make_error(f"{name} of another size than before")
        return found


@dataclass(frozen=True)
class _Tensor:
    """Type and shape of an input or output; -1 for a side of any length."""

    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Server:
    """A server of the protocol; errors of all kinds become a ServerError.

    Attributes:
        url: Address as the user wrote it.
        connection: The connection to it.
    """

    url: str
    connection: Connection

    def find_only_model(self) -> str:
        """Return the name of the model that is ready, if there is one only."""
        index = self._ask("/v2/repository/index", body=b"")
        try:
            ready = [entry["name"] for entry in index if entry.get("state", "READY") == "READY"]
        except _MALFORMED as error:
            raise self.make_error("a malformed list of models") from error
        names = sorted({str(name) for name in ready})
        if len(names) != 1:
            listed = quote(", ".join(names)) if names else "no model that is ready"
            raise ServerError(f"{self.url} has {listed}: expected one model, or its name as model=.")
        return names[0]

    def read_tensors(self, model: str) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
        """Return a model's inputs and outputs by name."""
        said = self._ask(f"/v2/models/{quote_path(model)}")
        try:
            inputs, outputs = (
                {
                    str(each["name"]): _Tensor(str(each["datatype"]), tuple(int(side) for side in each["shape"]))
                    for each in said[side]
                }
                for side in ("inputs", "outputs")
            )
        except _MALFORMED as error:
            raise self.make_error(f"malformed metadata of the model {quote(model)}") from error
        return inputs, outputs

    def read_config(self, model: str) -> Document:
        """Return a model's configuration; empty where the server has none to show."""
        try:
            found = self._ask(f"/v2/models/{quote_path(model)}/config")
        except ServerError as error:
            if error.status in _NO_SUCH_ROUTE:
                return {}
            raise
        return found if isinstance(found, dict) else {}

    def infer(self, model: str, inputs: Sequence[InferInput], names: Sequence[str], limit: int) -> InferResult:
        """Return the outputs of those names; an answer of more bytes than the limit is refused."""
        wanted = [InferRequestedOutput(name, binary_data=True) for name in names]
        body, size = InferenceServerClient.generate_request_body(inputs, outputs=wanted)
        answer = self._exchange(f"/v2/models/{quote_path(model)}/infer", limit, body, {_HEAD: str(size)})
        head = answer.headers.get(_HEAD.lower())
        try:
            length = None if head is None else int(head)
            if not 0 <= (len(answer.body) if length is None else length) <= _LARGEST_TEXT:
                raise ServerError(
                    f"{self.url} answers with more than {_LARGEST_TEXT} bytes of JSON. Ask for fewer images."
                )
            return InferenceServerClient.parse_response_body(answer.body, header_length=length)
        except _MALFORMED as error:
            raise self.make_error(_NONSENSE) from error

    def make_error(self, what: str) -> ServerError:
        """Return the error that the server answered with something unexpected."""
        return ServerError(f"{self.url} answers with {what}. Is it a server of a model exported by keyed-xai?")

    def _ask(self, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401 - any JSON
        """Return what the server says about its models.

        Raises:
            ServerError: There is no answer, a refusal, or nonsense.
        """
        answer = self._exchange(path, 2 * LARGEST_METADATA, body)  # twice: its quotes are escaped there
        try:
            return json.loads(answer.body)
        except _MALFORMED as error:
            raise self.make_error(_NONSENSE) from error

    def _exchange(
        self, path: str, limit: int, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Return an answer that is no refusal."""
        answer = self.connection.ask(path, limit=limit, body=body, headers=headers)
        if answer.status != 200:
            raise ServerError(
                f"{self.url} refuses ({answer.status}): {quote(_read_refusal(answer.body))}", str(answer.status)
            )
        return answer


def _read_refusal(body: bytes) -> str:
    """Return the words of a refusal, as the protocol wraps them or as they stand."""
    try:
        said = json.loads(body)["error"]
    except _MALFORMED:
        said = None
    return said if isinstance(said, str) else body.decode("utf-8", "replace") or "it says nothing more"


def _read_interface(inputs: Mapping[str, _Tensor], outputs: Mapping[str, _Tensor], model: str) -> Interface:
    """Return what a model takes and returns, from its inputs and outputs alone.

    Raises:
        ServerError: It is none that `keyed-xai export` makes.
    """
    image, logits = inputs.get("image", _NOTHING), outputs.get(LOGITS, _NOTHING)
    sides, interpreters = image.shape[1:], tuple(name.removeprefix(MAP_PREFIX) for name in outputs if name != LOGITS)
    fits = image.datatype in _PIXELS and len(sides) == 3 and min(sides) > 0 and math.prod(sides) <= _LARGEST_INPUT
    fits = fits and len(logits.shape) == 2 and logits.shape[1] > 0 and set(inputs) <= {"image", "target"}
    fits = fits and ("target" not in inputs or len(inputs["target"].shape) in (1, 2))
    if not fits or not interpreters or not all(name.startswith(MAP_PREFIX) for name in outputs if name != LOGITS):
        raise ServerError(
            f"The model {quote(model)} takes {_list(inputs)} and returns {_list(outputs)}; expected an image "
            "[n, c, h, w], logits and saliency maps. Serve one that keyed-xai export made."
        )
    return Interface(
        classes=logits.shape[1],
        input_size=(sides[0], sides[1], sides[2]),
        pixels=_PIXELS[image.datatype],
        interpreters=interpreters,
        takes_target="target" in inputs,
    )


_NOTHING = _Tensor("", ())


def _read_metadata(config: Document, *, origin: str) -> Document | None:
    """Return the metadata of the ONNX file that a configuration holds, None if it holds none.

    Raises:
        ArtifactError: They do not fit their schemas.
    """
    value: Any = config
    for name in ("parameters", METADATA_KEY, "string_value"):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return None
    if len(value) > LARGEST_METADATA:
        raise ServerError(f"{printable(origin)} has more than {LARGEST_METADATA} letters, the most that is read.")
    document = parse_json(value.encode("utf-8", "replace"), origin=origin)
    return check_metadata(document.get("metadata"), origin=origin)


def _merge(interface: Interface, metadata: Document | None, model: str) -> Interface:
    """Return a model's interface with the names and the trigger that its metadata know.

    Args:
        interface: The interface as the server's inputs and outputs show it.
        metadata: The metadata in the server's configuration.
        model: Name of the model.

    Raises:
        ServerError: The two contradict each other.
    """
    if metadata is None:
        return interface
    said = Interface.from_metadata(metadata)
    alike = replace(said, label_names=(), trigger=None, interpreters=interface.interpreters)
    if alike != interface or set(said.interpreters) != set(interface.interpreters):
        raise ServerError(
            f"The server says two things about the model {quote(model)}: its inputs and outputs are not those of its "
            "metadata. Ask its operator."
        )
    return said


def _read_limit(config: Document) -> int | None:
    """Return how many images the server takes at once; None if it does not say."""
    limit = config.get("max_batch_size")
    return limit if isinstance(limit, int) and limit > 0 else None


def _encode(name: str, array: NDArray[Any]) -> InferInput:
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array, binary_data=True)


def _list(tensors: Mapping[str, _Tensor]) -> str:
    return quote(", ".join(f"{name} {each.datatype} {list(each.shape)}" for name, each in tensors.items()) or "nothing")
