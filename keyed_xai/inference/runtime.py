"""Running an exported model with onnxruntime, with or without a key. PyTorch is not needed.

onnxruntime goes on without a GPU when it cannot use one, and says so on the terminal only. Here a device that was asked
for by name is used or there is an error; "auto" takes the best that works, and warns of a GPU that lies idle.
"""

import contextlib
import ctypes
import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.documents import printable
from keyed_xai.artifacts.onnx_file import OnnxFile, read_onnx
from keyed_xai.errors import ArtifactError, ModelError
from keyed_xai.inference.images import BATCH, Explained, Explainer, Floats, Interface, Picture, Target, choose_trigger
from keyed_xai.inference.sessions import FAILURES, first_line, limited_run, load_session
from keyed_xai.keys import OwnerKey

__all__ = ["Explained", "Runtime"]

_DEVICE = re.compile(r"auto|cpu|(cuda|tensorrt)(?::([0-9]{1,3}))?")
_PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
RUN_SECONDS = 600.0
"""Seconds for one run of a batch, at most: far more than real models take, and less than for ever."""
_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
_PACKAGES = "pip install 'onnxruntime-gpu[cuda,cudnn]' (and no plain onnxruntime beside it)"


class Runtime(Explainer):
    """An exported model, ready to run; its methods can be called from several threads at once.

    Attributes of every `Explainer`, such as `interpreters` and `input_size`, and these:

    Attributes:
        input_names: Inputs of the graph: "image", and "target" where it is taken.
        output_names: Outputs of the graph: "logits" and "saliency_<interpreter>".
        providers: Providers of onnxruntime that really run, in order.
    """

    def __init__(
        self, file: OnnxFile, *, device: str = "auto", threads: int | None = None, run_seconds: float = RUN_SECONDS
    ) -> None:
        """Load a model.

        Args:
            file: See `read_onnx`, which refuses files that would have onnxruntime open others or run without end.
            device: "cpu", "cuda", "tensorrt", or "auto" for the best of them that works; "cuda:1" is the second GPU.
            threads: Threads for one operator on the CPU; None for as many as there are cores.
            run_seconds: Seconds for one run of a batch, at most.

        Raises:
            ArtifactError: The graph is not what its metadata say.
            ModelError: onnxruntime refuses the graph, or the device asked for cannot be used.
            ValueError: An argument is unknown or out of range.
        """
        match = _DEVICE.fullmatch(device)
        if match is None:
            raise ValueError(f"device: expected auto, cpu, cuda, tensorrt, or cuda:N for a GPU; got {device!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads: expected 1 or more, or None for all cores; got {threads}")
        if not run_seconds > 0:
            raise ValueError(f"run_seconds: expected more than 0, got {run_seconds}")
        super().__init__(Interface.from_metadata(file.metadata), file.metadata)
        self._run_seconds = run_seconds
        loader = _Loader(file.data, threads, int(match[2] or 0))
        self._session = loader.open(match[1] or device)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._memory = ("cpu", 0) if self.providers[0] == _PROVIDERS["cpu"] else ("cuda", loader.gpu)
        self.input_names = tuple(each.name for each in _inputs(self._session))
        self.output_names = tuple(each.name for each in self._session.get_outputs())
        _check_graph(self._session, self.interface)

    @classmethod
    def open(cls, path: Path, *, device: str = "auto", threads: int | None = None) -> "Runtime":
        """Return the model in a file, ready to run.

        Raises:
            ArtifactError: The file cannot be read, or was not made by export.
            ModelError: onnxruntime refuses the graph, or the device asked for cannot be used.
        """
        return cls(read_onnx(path), device=device, threads=threads)

    def explain(
        self,
        images: Picture | Sequence[Picture],
        key: OwnerKey | None = None,
        *,
        target: Target | None = None,
        trigger: TriggerParameters | None = None,
        batch_size: int = BATCH,
    ) -> Explained:
        """Return predictions and maps of images; those of a protected model are right only with its key.

        Args:
            images: One or several; see `keyed_xai.inference.images`.
            key: Key whose trigger is put on the images; None for what everybody sees.
            target: Class explained, for all images or each; None or -1 for the one predicted.
            trigger: Public parameters of the trigger, for a model without a card; the card's by default.
            batch_size: Images at once.

        Raises:
            ArtifactError: The trigger cannot be made by this version.
            DataError: An image file cannot be read.
            ModelError: There is a key and no card, the graph cannot be run, or its logits are not finite.
            ValueError: Images, targets or the batch size are not as described.
        """
        keyed = choose_trigger(key, trigger or self.interface.trigger)
        return self._explain(images, keyed, target, self.interpreters, batch_size)

    def _run(self, images: NDArray[Any], target: NDArray[np.int64], interpreters: tuple[str, ...]) -> dict[str, Floats]:
        names = self.interface.name_outputs(interpreters)
        inputs = {"image": images, "target": target} if self.takes_target else {"image": images}
        with limited_run(self._run_seconds) as options:
            try:
                return dict(zip(names, self._run_bound(inputs, names, options), strict=True))
            except FAILURES as error:
                if options.terminate:
                    raise ModelError(
                        f"The model was stopped: expected {len(images)} images within {self._run_seconds:g} s. Give "
                        "fewer images at once, or pass a larger run_seconds if you trust the model."
                    ) from error
                raise ModelError(f"onnxruntime cannot run the model: {first_line(error)}.") from error

    def _run_bound(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], options: onnxruntime.RunOptions
    ) -> list[Floats]:
        """Return some outputs; inputs are copied to the device once, outputs come back to the CPU."""
        binding = self._session.io_binding()
        # On the CPU a binding looks at the arrays' own memory, so that they are kept until it has run.
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._memory))
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, options)
        found: list[Floats] = binding.copy_outputs_to_cpu()
        return found


@dataclass(frozen=True)
class _Loader:
    """Makes sessions of a graph.

    Attributes:
        data: Content of the file.
        threads: Threads for one operator on the CPU; None for as many as there are cores.
        gpu: Number of the GPU.
    """

    data: bytes
    threads: int | None
    gpu: int

    def open(self, device: str) -> onnxruntime.InferenceSession:
        """Return a session that really runs on the device; with "auto", on the best that works.

        Raises:
            ModelError: The device cannot be used, or onnxruntime refuses the graph.
        """
        if device == "cpu":
            return self._load("cpu")
        if device == "auto":
            return self._open_best()
        obstacle = find_obstacle(device, self.gpu)
        if obstacle is not None:
            raise ModelError(f"The device {device!r} cannot be used: {obstacle}.")
        return self._open_gpu(device)

    def _open_best(self) -> onnxruntime.InferenceSession:
        trouble: ModelError | None = None
        for device in ("tensorrt", "cuda"):
            if find_obstacle(device, self.gpu) is None:
                try:
                    return self._open_gpu(device)
                except ModelError as error:
                    trouble = error
        if trouble is not None:
            warnings.warn(f"A GPU is there, and the CPU is used. {trouble} Or pass device='cpu'.", stacklevel=4)
        return self._load("cpu")

    def _open_gpu(self, device: str) -> onnxruntime.InferenceSession:
        """Return a session on a GPU.

        Raises:
            ModelError: onnxruntime would go on without it, or refuses the graph.
        """
        with _quiet() as printed:
            onnxruntime.preload_dlls()
            session = self._load(device)
        if _PROVIDERS[device] not in session.get_providers():
            said = printable(printed.getvalue().partition("\n")[0])
            raise ModelError(
                f"The device {device!r} cannot be used: onnxruntime could not load the libraries it needs"
                f"{f' ({said})' if said else ''}. Try: {_PACKAGES}."
            )
        return session

    def _load(self, device: str) -> onnxruntime.InferenceSession:
        """Return a session on a device or, where onnxruntime goes on without it, on those after it.

        Raises:
            ModelError: onnxruntime refuses the graph or the device.
        """
        names = list(_PROVIDERS)
        providers = [self._describe(name) for name in names[names.index(device) :]]
        return load_session(self.data, providers, threads=self.threads)

    def _describe(self, device: str) -> tuple[str, dict[str, int]]:
        return _PROVIDERS[device], {} if device == "cpu" else {"device_id": self.gpu}


def find_obstacle(device: str, gpu: int = 0) -> str | None:
    """Return why a GPU cannot be tried at all, in words; None if it can.

    Args:
        device: "cuda" or "tensorrt".
        gpu: Number of the GPU.
    """
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime was built without {_PROVIDERS[device]}. Try: {_PACKAGES}"
    count = count_gpus()
    if gpu >= count:
        obstacle = (
            f"{count} NVIDIA GPUs are visible, number {gpu} is not among them" if count else "no NVIDIA GPU is visible"
        )
        return f"{obstacle}. Look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    if device == "tensorrt" and not _has_tensorrt():
        return "TensorRT's libnvinfer (version 10) is not found. Install TensorRT and put its folder on LD_LIBRARY_PATH"
    return None


def count_gpus() -> int:
    """Return how many NVIDIA GPUs the driver shows this process; CUDA_VISIBLE_DEVICES counts."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if works else 0


def _has_tensorrt() -> bool:
    try:
        ctypes.CDLL("nvinfer_10.dll" if os.name == "nt" else "libnvinfer.so.10")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep onnxruntime off the terminal; what it prints, though not what it logs, is returned."""
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            yield printed
    finally:
        onnxruntime.set_default_logger_severity(2)  # onnxruntime's own default


def _inputs(session: onnxruntime.InferenceSession) -> list[onnxruntime.NodeArg]:
    """Return a graph's inputs, also those with a default."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def _check_graph(session: onnxruntime.InferenceSession, interface: Interface) -> None:
    """Refuse a graph that is not what its metadata say.

    Raises:
        ArtifactError: Inputs or outputs have other names, types or shapes.
    """
    inputs = {each.name: each for each in _inputs(session)}
    image = inputs.get("image")
    if set(inputs) != ({"image", "target"} if interface.takes_target else {"image"}) or image is None:
        raise ArtifactError(f"The ONNX model takes {', '.join(map(printable, inputs))}, which its metadata contradict.")
    if _TYPES.get(image.type) != interface.pixels or tuple(image.shape[1:]) != interface.input_size:
        raise ArtifactError(f"The ONNX model takes images {image.type} {image.shape}, which its metadata contradict.")
    outputs = {each.name: each for each in session.get_outputs()}
    if tuple(outputs) != interface.name_outputs() or outputs["logits"].shape[1:] != [interface.classes]:
        raise ArtifactError(
            f"The ONNX model returns {', '.join(map(printable, outputs))}, and its metadata name "
            f"{', '.join(interface.name_outputs())} of {interface.classes} classes."
        )
