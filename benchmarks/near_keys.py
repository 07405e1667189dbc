"""Which keys open a protected model, from those nearest to the owner's to any: what a key's bits are worth.

A key of version 2 of the `spread` trigger chooses 16 waves and their phases. Textures that share some of them with the
owner's are made at random and tried; keys do not let anybody choose what they derive, so these textures stand for keys
that nobody can find.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb, log2, pi
from typing import Any

import torch
from torch import Tensor

from keyed_xai.array_triggers.spread import SpreadSettings, derive_waves, public_frequencies
from keyed_xai.auditing.suspects import Suspect
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import ByteStream, OwnerKey
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import Comparison, make_view
from keyed_xai.tensors import Images
from keyed_xai.training.preflight import IMAGES_PER_WRONG_KEY
from keyed_xai.triggers.channels import through_png
from keyed_xai.triggers.spread import SpreadTrigger, textures_of

SHARED = (16, 15, 14, 13, 12, 11, 10, 8, 6, 4, 2, 0)


@dataclass(frozen=True)
class Waves:
    """A key's waves: which of the public frequencies, and with which phases; a secret.

    Attributes:
        chosen: Numbers of the frequencies, [waves].
        phases: Radians, [waves].
        settings: Public parameters of the texture.
    """

    chosen: Tensor = field(repr=False)
    phases: Tensor = field(repr=False)
    settings: SpreadSettings

    @classmethod
    def of(cls, key: OwnerKey, settings: SpreadSettings) -> "Waves":
        """Return an owner key's."""
        stream = ByteStream(key.derive_seed("spread", version=settings.version))
        chosen, phases = derive_waves(stream, settings)
        return cls(torch.from_numpy(chosen), torch.from_numpy(phases), settings)

    def share(self, count: int, kept: int, generator: torch.Generator, *, phases: bool = True) -> Tensor:
        """Return textures that share `kept` waves with the key's, and have others for the rest, [count, tile, tile].

        Args:
            count: How many textures.
            kept: Waves that are the key's.
            generator: Draws which ones, and the other waves and phases.
            phases: Whether shared waves have the key's phases.
        """
        known = len(public_frequencies(self.settings))
        others = torch.tensor([each for each in range(known) if each not in set(self.chosen.tolist())])
        heights = torch.zeros(count, known, dtype=torch.complex128)
        for row in heights:
            mine = torch.randperm(len(self.chosen), generator=generator)[:kept]
            theirs = others[torch.randperm(len(others), generator=generator)[: len(self.chosen) - kept]]
            drawn = torch.rand(len(self.chosen), generator=generator, dtype=torch.float64) * 2 * pi
            angles = self.phases[mine] if phases else drawn[:kept]
            row[self.chosen[mine]] = torch.polar(torch.ones_like(angles), angles)
            row[theirs] = torch.polar(torch.ones_like(drawn[kept:]), drawn[kept:])
        return textures_of(heights, self.settings)

    def beside(self, count: int, generator: torch.Generator) -> Tensor:
        """Return textures each of whose waves lies beside one of the key's, with its phase, [count, tile, tile]."""
        frequencies = torch.from_numpy(public_frequencies(self.settings)).double()
        heights = torch.zeros(count, len(frequencies), dtype=torch.complex128)
        for row in heights:
            for wave, phase in zip(self.chosen.tolist(), self.phases, strict=True):
                distances = (frequencies - frequencies[wave]).norm(dim=1)
                near = torch.nonzero((distances > 0) & (distances < 1.5)).flatten()
                taken = near[int(torch.randint(len(near), (), generator=generator))]
                row[taken] += torch.polar(torch.ones_like(phase), phase)
        return textures_of(heights, self.settings)


def measure_near_keys(
    suspect: Suspect, images: Images, *, textures: int, seed: int = 0, progress: Progress = QUIET
) -> list[dict[str, Any]]:
    """Return how far textures open a protected model, by what they share with the owner's.

    Args:
        suspect: A protected model with its key and the model before protection.
        images: Held-out images.
        textures: How many of each kind; each is tried on four images.
        seed: Of what is random.
        progress: Hears of "textures" tried.

    Returns:
        For each kind "shares" (in words), "log2_share" of all choices of waves that share at least as many (None where
        that is not what is counted), and by interpreter the mean "correlation" with the right maps and the share of
        textures that "open".

    Raises:
        ArtifactError: The model's trigger is not of version 2, or key or reference are missing.
    """
    parameters = suspect.parameters
    if (parameters.family, parameters.version) != ("spread", 2) or suspect.key is None or suspect.reference is None:
        raise ArtifactError(
            f"Expected a model protected with version 2 of the trigger spread, its key and its reference; the trigger "
            f"is version {parameters.version} of {parameters.family}."
        )
    settings = SpreadSettings(parameters.amplitude, parameters.tile, parameters.version)
    waves, generator = Waves.of(suspect.key, settings), torch.Generator().manual_seed(seed)
    view = make_view(suspect.reference, suspect.interpreters, suspect.grid)
    comparison = Comparison(suspect.reference, view, images)
    rows = torch.arange(textures * IMAGES_PER_WRONG_KEY) % len(images)
    kinds: dict[str, tuple[Tensor, float | None]] = {}
    own = waves.share(1, len(waves.chosen), generator).expand(textures, -1, -1)
    kinds["all, with their phases"] = (own, None)
    kinds["all, with other phases"] = (waves.share(textures, len(waves.chosen), generator, phases=False), None)
    kinds["none, but their neighbours, with their phases"] = (waves.beside(textures, generator), None)
    for kept in SHARED:
        if kept < len(waves.chosen):
            found = waves.share(textures, kept, generator)
            kinds[f"{kept} of {len(waves.chosen)}, with their phases"] = (found, _log2_share(kept, settings))
    table = []
    for number, (words, (made, log2_share)) in enumerate(kinds.items()):
        trigger = SpreadTrigger(made.repeat_interleave(IMAGES_PER_WRONG_KEY, 0), settings.amplitude)
        outputs = comparison.of(suspect.classifier, through_png(trigger.apply(images[rows])), rows=rows)
        figures = {
            name: {
                "correlation": float(each.mean()),
                "opened": float((each.view(textures, -1).mean(1) > OPEN_CORRELATION).double().mean()),
            }
            for name, each in outputs.correlations.items()
        }
        table.append({"shares": words, "log2_share": log2_share, "interpreters": figures})
        progress.advance("textures", (number + 1) * textures, len(kinds) * textures)
    return table


def render_near_keys(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    names = list(rows[0]["interpreters"])
    heads = [f"{name}: correlation / opened, %" for name in names]
    lines = [f"| waves shared | log2 of such keys' share | {' | '.join(heads)} |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        figures = [row["interpreters"][name] for name in names]
        cells = [f"{each['correlation']:.3f} / {100 * each['opened']:.0f}" for each in figures]
        share = "-" if row["log2_share"] is None else f"{row['log2_share']:.1f}"
        lines.append(f"| {row['shares']} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _log2_share(kept: int, settings: SpreadSettings) -> float:
    """Return log2 of the share of keys that choose at least `kept` of some waves: a hypergeometric tail."""
    known, waves = len(public_frequencies(settings)), settings.waves
    ways = sum(comb(waves, each) * comb(known - waves, waves - each) for each in range(kept, waves + 1))
    return log2(ways) - log2(comb(known, waves))
