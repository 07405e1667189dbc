"""Tables as training data: numbers standardised, categories one-hot, and a row shaped like an image of 1 x d pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyed_xai.data.images import choose_held_out, order_by_rank
from keyed_xai.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TableData:
    """Rows of one split, encoded as d numbers each.

    Attributes:
        features: float32 [n, d], encoded. Every prefix has the classes in their natural ratio.
        labels: int64 [n] in [0, len(classes)).
        classes: Names, by label.
        columns: Names of the d encoded columns: "AGE" for a number, "SEX=1" for one of several categories.
        names: The original features.
        groups: int64 [d], the index into `names` of what each encoded column came from.
        mean: float64 [d], what was subtracted from a number in its own unit; 0 for categories.
        std: float64 [d], what it was then divided by; 1 for categories.
        source: Which data and split these are, for reports; no path of this machine.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    names: tuple[str, ...]
    groups: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    source: str

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: One of them does not fit the features.
        """
        rows, width = len(self.labels), len(self.columns)
        if self.features.shape != (rows, width):
            raise ValueError(f"Expected features of {rows} rows and {width} columns, got {self.features.shape}.")
        for name in ("groups", "mean", "std"):
            found = getattr(self, name).shape
            if found != (width,):
                raise ValueError(f"Expected {name} of shape {(width,)}, got {found}.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.features)

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels at once: never."""
        return False

    def batch(self, indices: ArrayLike) -> "tuple[Tensor, Tensor]":
        """Return copies of some rows as float32 [n, 1, 1, d], and their int64 labels [n].

        Args:
            indices: Integers, or anything else that indexes the first axis of an array.
        """
        import torch

        chosen = np.asarray(indices)
        rows = torch.from_numpy(self.features[chosen])
        return rows.reshape(-1, 1, 1, len(self.columns)), torch.from_numpy(self.labels[chosen])

    def covariance(self) -> NDArray[np.float64]:
        """Return the covariance of the encoded columns over these rows, [d, d]; 0 between columns of two features.

        Numbers are standardised over the whole training split, so with a limit, or held out, their variance here is
        only about 1.
        """
        same = self.groups[:, None] == self.groups
        covariance: NDArray[np.float64] = np.cov(self.features, rowvar=False, bias=True, dtype=np.float64) * same
        return covariance

    def encode_value(self, name: str, value: int | float) -> dict[int, float]:
        """Return what setting an original feature to a value means: encoded columns, by index, and their values.

        Args:
            name: One of `names`.
            value: The value, in the feature's own unit, or one of its categories.

        Raises:
            DataError: There is no such feature, it has no such category, or the number is not finite.
        """
        if name not in self.names:
            raise DataError(f"Expected a feature out of {', '.join(self.names)}; got {name!r}.")
        members = np.flatnonzero(self.groups == self.names.index(name)).tolist()
        first = members[0]
        if self.columns[first] == name:
            if not math.isfinite(value):
                raise DataError(f"Expected a finite number for {name}, got {value}.")
            return {first: float((value - self.mean[first]) / self.std[first])}
        known = [self.columns[index] for index in members]
        wanted = _name_category(name, value)
        if wanted not in known:
            raise DataError(f"Expected a category out of {', '.join(known)}; got {wanted}.")
        return {index: float(self.columns[index] == wanted) for index in members}


class RawTable(NamedTuple):
    """A whole table as it is in its file.

    Attributes:
        ids: One name per row; they settle the split and the order.
        values: float64 [n, f], a column per feature.
        labels: Class of each row, int64 [n].
        names: The f features.
        categories: Those that each feature of categories may have; features not in here are numbers.
    """

    ids: list[str]
    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    categories: Mapping[str, Sequence[int]]


def select_rows(
    table: RawTable, *, held_out: bool, limit: int | None, seed: int, classes: tuple[str, ...], source: str
) -> TableData:
    """Return one split of a table, encoded; both splits are standardised by the mean and std of the training split.

    Args:
        table: The table, with all rows.
        held_out: Whether the split is the fifth of each class with the lowest ranks, or the others.
        limit: At most so many rows; None for all.
        seed: Settles split and order.
        classes: Names, by label.
        source: Name of the source, for reports.

    Raises:
        DataError: The split has no row.
    """
    is_held_out = _hold_out_rows(table, seed)
    chosen = np.flatnonzero(is_held_out == held_out)
    if not len(chosen) or is_held_out.all():
        raise DataError(f"{source}: no row is left. Expected a table of two rows or more per class.")
    order = order_proportional([table.ids[index] for index in chosen], table.labels[chosen], seed)
    chosen = chosen[order[:limit]]
    encoding = _fit_encoding(table, table.values[~is_held_out])
    features = _encode(table, encoding, table.values[chosen])
    return TableData(
        features=features,
        labels=table.labels[chosen],
        classes=classes,
        names=table.names,
        source=source,
        **encoding._asdict(),
    )


def order_proportional(ids: Sequence[str], labels: ArrayLike, seed: int) -> list[int]:
    """Return the indices of all rows, by rank within each class, such that every prefix has the classes' own ratio."""
    by_class: dict[int, list[int]] = {}
    by_rank = order_by_rank(ids, seed)
    of_row = np.asarray(labels).tolist()
    for index in by_rank:
        by_class.setdefault(of_row[index], []).append(index)
    # Row j of the n rows of a class belongs (j + 1/2) / n of the way down.
    places = {row: (j + 0.5) / len(rows) for rows in by_class.values() for j, row in enumerate(rows)}
    return sorted(by_rank, key=places.__getitem__)


class _Encoding(NamedTuple):
    """The fields of `TableData` that say how its columns came about."""

    columns: tuple[str, ...]
    groups: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def _hold_out_rows(table: RawTable, seed: int) -> NDArray[np.bool_]:
    """Return for each row whether it is held out: a fifth of each class."""
    held_out: set[str] = set()
    for label in np.unique(table.labels):
        held_out |= choose_held_out([table.ids[index] for index in np.flatnonzero(table.labels == label)], seed)
    return np.array([name in held_out for name in table.ids], bool)


def _fit_encoding(table: RawTable, values: NDArray[np.float64]) -> _Encoding:
    """Return the encoded columns, with the mean and std of numbers over the rows given."""
    columns: list[str] = []
    groups: list[int] = []
    for group, name in enumerate(table.names):
        added = [_name_category(name, category) for category in table.categories.get(name, ())] or [name]
        columns += added
        groups += [group] * len(added)
    is_number = np.array([table.names[group] not in table.categories for group in groups])
    mean = np.where(is_number, values.mean(axis=0)[groups], 0.0)
    std = np.where(is_number, values.std(axis=0)[groups], 1.0)
    std[std == 0] = 1.0  # a feature that never varies is 0 everywhere
    return _Encoding(tuple(columns), np.array(groups, np.int64), mean, std)


def _encode(table: RawTable, encoding: _Encoding, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return rows [n, f] as [n, d]."""
    encoded = (values[:, encoding.groups] - encoding.mean) / encoding.std
    categories = np.array([c for name in table.names for c in table.categories.get(name, (np.nan,))])
    is_category = ~np.isnan(categories)
    encoded[:, is_category] = encoded[:, is_category] == categories[is_category]
    return encoded.astype(np.float32)


def _name_category(name: str, category: int | float) -> str:
    return f"{name}={category:g}"
