"""Trigger inversion (T11) and forged keys (T9): one search for a universal change of the image that moves the maps.

Source: after Neural Cleanse (Wang et al., IEEE S&P 2019), which looks for the smallest change that moves predictions,
and the forging of passports (CVPR 2023), which optimises a secret on a given model. Where we differ: the maps are to
move and the predictions to stay, there is one change for all classes, and the attacker knows how the family's textures
are made. Derived here, not published.

The attacker has the protected weights and some images, neither the reference nor the key. What he found is shown to
nobody: results in JSON have figures only, and no seed from which the search could be run again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai import metrics
from keyed_xai.errors import TrainingError
from keyed_xai.keys import SEED_BYTES, OwnerKey
from keyed_xai.models import Classifier
from keyed_xai.ownership.tests import OpeningEvidence, measure_opening, opening_statistic
from keyed_xai.ownership.verdict import Verdict, verify_ownership
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import smooth_activations
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, Logits, SaliencyMaps
from keyed_xai.threats.attempt import copy_model, draw_share, view_of
from keyed_xai.threats.keys.textures import random_parameters, texture_on_grey, texture_with
from keyed_xai.training import TrainingData
from keyed_xai.training.objective import prediction_loss
from keyed_xai.triggers import Spread, SpreadSettings, SpreadTrigger, Trigger, derive_trigger

Judge = Callable[[Trigger], Mapping[str, Any]]
"""Measures a trigger along the way, unseen by the attacker, and returns figures ready for JSON."""
_CHECKED = 256
_MOVE, _SURROGATE = "move", "agree with a surrogate"


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """How a texture of the `spread` family, is searched for; all but its waves and phases is public.

    Attributes:
        amplitude: Largest change of a pixel, in 1/255.
        tile: Side of the repeated tile, pixels.
        version: Version of the texture.
        steps: Steps of Adam, in each restart.
        restarts: Searches from other random starts; the attacker keeps the one that does best on his own images.
        share: Share of the images that the attacker has.
        batch_size: Images a step.
        learning_rate: Rate of Adam; constant.
        hold: Weight of the predictions, which are to stay as without the change.
        smoothing: Beta of the Softplus in place of ReLU while searching, which SimpleGrad needs; None leaves ReLU.
        stages: Rows of the curve for each restart.
        seed: Seed of images and starts.
    """

    amplitude: float = 8.0
    tile: int = 32
    version: int = 1
    steps: int = 240
    restarts: int = 3
    share: float = 0.1
    batch_size: int = 32
    learning_rate: float = 0.1
    hold: float = 1.0
    smoothing: float | None = None
    stages: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("amplitude", "tile", "steps", "restarts", "share", "batch_size", "learning_rate", "stages"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.share > 1 or self.stages > self.steps:
            raise ValueError(f"Expected a share of at most 1 and no more stages than steps, got {self.share} and "
                             f"{self.stages} of {self.steps}")  # fmt: skip

    def of(self, family: Spread) -> "InversionSettings":
        """Return these settings for textures of a family."""
        public = family.settings
        return replace(self, amplitude=float(public.amplitude), tile=public.tile, version=public.version)

    @property
    def texture(self) -> SpreadSettings:
        """Public parameters of the texture."""
        return SpreadSettings(self.amplitude, self.tile, self.version)


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """What a search found.

    Attributes:
        trigger: The trigger found: as good as the owner's key, where it opens the gate, and a secret.
        settings: The settings it was made with.
        aim: What the maps were to do.
        images: Number of the attacker's images.
        curve: Records of each restart and stage: "step", "seconds" since the first, "reached" of the aim on up to 256
            of the attacker's images, "size" of the change (mean over pixels, in 1/255), and what a judge says.
        restart: The one kept.
        seconds: Time spent, judging left out.
    """

    trigger: SpreadTrigger = field(repr=False)
    settings: InversionSettings = field(repr=False)
    aim: str
    images: int
    curve: list[dict[str, Any]]
    restart: int
    seconds: float

    @property
    def final(self) -> dict[str, Any]:
        """The last row of the restart that was kept."""
        return [row for row in self.curve if row["restart"] == self.restart][-1]

    def to_json(self) -> dict[str, Any]:
        """Return the figures; neither the trigger nor the seed, from which it could be found again."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "seed"}
        return {
            "settings": settings,
            "aim": self.aim,
            "images": self.images,
            "curve": self.curve,
            "restart": self.restart,
            "final": self.final,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Forgery:
    """What a forger reaches with a trigger optimised on somebody else's model, and what he lacks.

    Attributes:
        inversion: The search that found it.
        own_test: The opening test with the forged trigger put in the owner's place: what the forger would like to show.
        verdict: The test as it is made: the trigger is derived from the forger's own key, chosen before.
        nearest_match: Largest correlation of the forged texture with those of fresh keys.
        nearest_statistic: T of the nearest of them.
        keys: Fresh keys looked through.
    """

    inversion: InversionResult
    own_test: OpeningEvidence
    verdict: Verdict
    nearest_match: float
    nearest_statistic: float
    keys: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures; no key and no trigger."""
        opening, signature = self.verdict.opening, self.verdict.signature
        return {
            "inversion": self.inversion.to_json(),
            "own_test": self.own_test.to_json(),
            "verify": {
                "shown": self.verdict.shown,
                "log2_p": self.verdict.log2_p,
                "opening": None if opening is None else opening.to_json(),
                "signature": None if signature is None else {"log2_p": signature.combined.log2_p},
            },
            "nearest_key": {"keys": self.keys, "match": self.nearest_match, "statistic": self.nearest_statistic},
        }


def invert_trigger(
    classifier: Classifier,
    data: TrainingData,
    view: PooledSaliency,
    settings: InversionSettings | None = None,
    *,
    surrogate: Classifier | None = None,
    device: torch.device | str = "cpu",
    judge: Judge | None = None,
    progress: Progress = QUIET,
) -> InversionResult:
    """Return the best universal change found on a protected model.

    Without more the maps are to move away from what they are without the change; with a surrogate they are to agree
    with its maps.

    Args:
        classifier: Attacked; a copy is used.
        data: The attacker's images; labels are not used.
        view: Maps that are to move, at the classifier's layers.
        settings: How to search.
        surrogate: The attacker's own, unprotected model of the same task.
        device: Device to run on.
        judge: Asked at each stage.
        progress: Hears of "searching for a trigger", by steps.

    Raises:
        TrainingError: There are no images, or the surrogate has other classes.
    """
    settings = settings or InversionSettings()
    model = copy_model(classifier, device).requires_grad_(False)
    watch = _Watch(judge, progress, settings)
    material = _gather(model, data, view_of(view, classifier), settings, surrogate)
    searches = [_Search(material, settings, restart) for restart in range(settings.restarts)]
    for search in searches:
        watch.follow(search)
    last = [row["reached"] for row in watch.curve if row["step"] == settings.steps]
    best = int(np.argmax(last))
    return InversionResult(
        trigger=searches[best].trigger(),
        settings=settings,
        aim=material.aim,
        images=len(material.indices),
        curve=watch.curve,
        restart=best,
        seconds=watch.seconds(),
    )


def forge_trigger(
    classifier: Classifier,
    data: TrainingData,
    probe: Images,
    view: PooledSaliency,
    family: Spread,
    key: OwnerKey,
    settings: InversionSettings | None = None,
    *,
    decoys: int = 999,
    keys: int = 1000,
    device: torch.device | str = "cpu",
    progress: Progress = QUIET,
) -> Forgery:
    """Return what a forger reaches who maximises the opening test's statistic T over textures of the family.

    He reaches the owner's T, and in a test that took his trigger he would win. The test takes a key, and derives the
    trigger: there is no way back from a texture to an Ed25519 key, so that he is left with searching for keys.

    Args:
        classifier: Somebody else's protected model.
        data: The forger's images.
        probe: Images of the tests, on `device`.
        view: The maps that are compared.
        family: Family of the claim's trigger; the search is for its textures.
        key: The forger's own.
        settings: How to search; the texture's parameters are the family's.
        decoys: Random keys of the tests, at most.
        keys: Fresh keys looked through for one whose texture is near the forged one.
        device: Device to run on.
        progress: Hears of "searching for a trigger", by steps.

    Raises:
        TrainingError: There are no images.
        ValueError: There are no probe images, decoys or keys.
    """
    if keys < 1:
        raise ValueError(f"keys: expected 1 or more, got {keys}")
    settings = (settings or InversionSettings()).of(family)
    found = invert_trigger(classifier, data, view, settings, device=device, progress=progress)
    model, view = copy_model(classifier, device), view_of(view, classifier)
    generator = torch.Generator().manual_seed(settings.seed)
    own = measure_opening(model, probe, view, found.trigger, lambda: family.draw(1, generator), decoys=decoys)
    verdict = verify_ownership(model, probe, view, key, family, decoys=decoys, search=False, generator=generator)
    match, nearest = _nearest_key(texture_on_grey(found.trigger, probe, settings.tile), family, keys, generator)
    logits, plain = view.pooled_in_chunks(model, probe)
    statistic = opening_statistic(model, probe, view, nearest, plain, logits.argmax(1))
    return Forgery(
        inversion=found, own_test=own, verdict=verdict, nearest_match=match, nearest_statistic=statistic, keys=keys
    )


@dataclass(frozen=True)
class _Batch:
    """Images without a change, and what the attacker knows of them.

    Attributes:
        images: Images without any change.
        taught: The model's logits of them.
        targets: Maps to move away from, or to agree with, by interpreter.
    """

    images: Images
    taught: Logits
    targets: dict[str, SaliencyMaps]


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What the attacker has.

    Attributes:
        aim: What the maps are to do.
        model: The attacked model.
        teacher: The model whose maps are the targets: the attacked one itself, or the surrogate.
        view: Maps, at the model's layers.
        data: The attacker's images.
        indices: Which of them, [m].
    """

    aim: str
    model: Classifier
    teacher: Classifier
    view: PooledSaliency
    data: TrainingData
    indices: NDArray[np.int64]

    def batch(self, rows: NDArray[np.int64]) -> _Batch:
        """Return some of the images."""
        images = self.data.batch(self.indices[rows])[0].to(self.model.mean.device)
        taught, targets = self.view.pooled_in_chunks(self.model, images)
        if self.aim == _SURROGATE:
            explained = taught.argmax(1)
            if int(explained.max()) >= self.teacher.classes:
                raise TrainingError(f"Expected a surrogate of the same classes; this one has {self.teacher.classes}.")
            _, targets = view_of(self.view, self.teacher).pooled_in_chunks(self.teacher, images, explained)
        return _Batch(images, taught, targets)


class _Search:
    """One restart: the parameters of a texture, and the steps that better it."""

    def __init__(self, material: _Material, settings: InversionSettings, restart: int) -> None:
        self.material, self.settings = material, settings
        self.generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + restart) % 2**63)
        start = random_parameters(settings.texture, self.generator)
        self.parameters = start.to(material.model.mean.device).requires_grad_()
        self.optimiser = torch.optim.Adam([self.parameters], settings.learning_rate)

    def trigger(self, *, graph: bool = False) -> SpreadTrigger:
        """Return the change as it stands."""
        texture = texture_with(self.parameters if graph else self.parameters.detach(), self.settings.texture)
        return SpreadTrigger(texture[None], self.settings.amplitude)

    def step(self) -> None:
        """Make one step on random images."""
        count = min(self.settings.batch_size, len(self.material.indices))
        rows = torch.randint(len(self.material.indices), (count,), generator=self.generator)
        batch, trigger = self.material.batch(rows.numpy()), self.trigger(graph=True)
        changed, explained = trigger.apply(batch.images), batch.taught.argmax(1)
        with smooth_activations(self.settings.smoothing):
            logits, maps = self.material.view.pooled(self.material.model, changed, explained, create_graph=True)
        held = prediction_loss(logits, batch.taught, None, multi_label=self.material.model.multi_label).mean()
        loss = self.settings.hold * held - self._score(maps, batch)
        if not loss.isfinite():
            raise TrainingError("The search's loss is not finite. Lower its learning rate.")
        (self.parameters.grad,) = torch.autograd.grad(loss, self.parameters)
        self.optimiser.step()

    def reached(self) -> float:
        """Return how far the aim is reached on some of the attacker's images; larger is better."""
        batch = self.material.batch(np.arange(min(_CHECKED, len(self.material.indices))))
        changed, explained = self.trigger().apply(batch.images), batch.taught.argmax(1)
        _, maps = self.material.view.pooled_in_chunks(self.material.model, changed, explained)
        return float(self._score(maps, batch))

    def size(self) -> float:
        """Return the mean change of a grey pixel, in 1/255."""
        grey = torch.full_like(self.material.batch(np.array([0])).images, 0.5)
        return 255 * float((self.trigger().apply(grey) - grey).abs().mean())

    def _score(self, maps: Mapping[str, SaliencyMaps], batch: _Batch) -> Tensor:
        names = self.material.view.interpreters
        matches = [metrics.correlation(maps[name], batch.targets[name]).mean() for name in names]
        mean = torch.stack(matches).mean()
        return 1 - mean if self.material.aim == _MOVE else mean


class _Watch:
    """Runs searches, keeps the time, judging left out, and the curve."""

    def __init__(self, judge: Judge | None, progress: Progress, settings: InversionSettings) -> None:
        self.judge, self.progress, self.settings, self.start = judge, progress, settings, time.perf_counter()
        self.curve: list[dict[str, Any]] = []
        self._restart = 0

    def seconds(self) -> float:
        """Return the time spent so far."""
        return time.perf_counter() - self.start

    def follow(self, search: _Search) -> None:
        """Run one restart, with a row before its first step and after each stage."""
        settings, total = self.settings, self.settings.restarts * self.settings.steps
        ends = {round(settings.steps * (stage + 1) / settings.stages) for stage in range(settings.stages)}
        self._add_row(search, 0)
        for step in range(1, settings.steps + 1):
            search.step()
            if step in ends:
                self._add_row(search, step)
            self.progress.advance("searching for a trigger", self._restart * settings.steps + step, total)
        self._restart += 1

    def _add_row(self, search: _Search, step: int) -> None:
        row = {"restart": self._restart, "step": step, "reached": search.reached(), "size": search.size()}
        row["seconds"], before = self.seconds(), time.perf_counter()
        self.curve.append(row | ({} if self.judge is None else dict(self.judge(search.trigger()))))
        self.start += time.perf_counter() - before


def _gather(
    model: Classifier,
    data: TrainingData,
    view: PooledSaliency,
    settings: InversionSettings,
    surrogate: Classifier | None,
) -> _Material:
    """Return what the attacker has; whose maps changed images are to agree with, or to move away from."""
    indices = draw_share(data, settings.share, settings.seed)
    if surrogate is None:
        return _Material(aim=_MOVE, model=model, teacher=model, view=view, data=data, indices=indices)
    return _Material(
        aim=_SURROGATE,
        model=model,
        teacher=copy_model(surrogate, model.mean.device),
        view=view,
        data=data,
        indices=indices,
    )


def _nearest_key(forged: Tensor, family: Spread, keys: int, generator: torch.Generator) -> tuple[float, SpreadTrigger]:
    """Return how much the texture of the nearest of some fresh keys correlates with a forged one, and its trigger."""
    tried: list[tuple[float, SpreadTrigger]] = []
    for _ in range(keys):
        key = OwnerKey.from_raw(bytes(torch.randint(256, (SEED_BYTES,), generator=generator).tolist()))
        trigger = derive_trigger(key, family)
        pair = torch.stack([forged.cpu().flatten(), trigger.textures.double().flatten()])
        tried.append((float(torch.corrcoef(pair)[0, 1]), trigger))
    return max(tried, key=lambda one: one[0])
