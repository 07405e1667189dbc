"""Tables: split and order, the encoding against a slow twin, and values encoded one by one."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keyed_xai.data import TableData
from keyed_xai.data.credit_default import CATEGORIES, NAMES
from keyed_xai.data.tables import order_proportional
from keyed_xai.errors import DataError
from tests.clients import ROWS, clients, load, make_rows, write


def encode_slowly(rows, training):
    """Return the names of the encoded columns and the rows, encoded value by value."""
    columns, encoded = [], [[] for _ in rows]
    for number, name in enumerate(NAMES, 1):
        for category in CATEGORIES.get(name, []):
            columns.append(f"{name}={category}")
            for row, made in zip(rows, encoded, strict=True):
                made.append(1.0 if row[number] == category else 0.0)
        if name not in CATEGORIES:
            columns.append(name)
            seen = [row[number] for row in training]
            mean, std = statistics.fmean(seen), statistics.pstdev(seen)
            for row, made in zip(rows, encoded, strict=True):
                made.append((row[number] - mean) / std)
    return columns, encoded


def test_encoding_equals_the_slow_twin(table):
    train, held_out = load(table), load(table, "held-out")
    by_client = {row[0]: row for row in make_rows()}
    training = [by_client[client] for client in clients(train)]
    for data in (train, held_out):
        rows = [by_client[client] for client in clients(data)]
        columns, encoded = encode_slowly(rows, training)
        assert list(data.columns) == columns
        assert data.features == pytest.approx(np.array(encoded), rel=1e-5, abs=1e-6)
        assert data.labels.tolist() == [row[-1] for row in rows]


def test_numbers_are_standardised_over_the_whole_training_split(table):
    whole, part = load(table), load(table, limit=7)
    numbers = [index for index, column in enumerate(whole.columns) if "=" not in column]
    assert whole.features[:, numbers].mean(0) == pytest.approx(np.zeros(20), abs=1e-6)
    assert whole.features[:, numbers].std(0) == pytest.approx(np.ones(20), abs=1e-6)
    for other in (part, load(table, "held-out")):
        assert np.array_equal(other.mean, whole.mean)
        assert np.array_equal(other.std, whole.std)
    assert np.array_equal(part.features, whole.features[:7])


def covariance_slowly(data):
    """Return the covariance over the rows, entry by entry, 0 between columns of two features."""
    columns = data.features.astype(float).T.tolist()
    means = [statistics.fmean(column) for column in columns]

    def entry(i, j):
        products = ((a - means[i]) * (b - means[j]) for a, b in zip(columns[i], columns[j], strict=True))
        return statistics.fmean(products) if data.groups[i] == data.groups[j] else 0.0

    return [[entry(i, j) for j in range(len(columns))] for i in range(len(columns))]


@pytest.mark.parametrize(("limit", "is_one"), [(None, True), (7, False)])
def test_covariance_is_of_these_rows_so_that_a_limit_moves_a_variance_off_one(table, limit, is_one):
    data = load(table, limit=limit)
    covariance = data.covariance()
    assert covariance == pytest.approx(np.array(covariance_slowly(data)), abs=1e-9)
    variances = np.diag(covariance)[[index for index, column in enumerate(data.columns) if "=" not in column]]
    assert (np.abs(variances - 1) < 1e-6).all() == is_one


def test_splits_are_disjoint_and_a_fifth_of_each_class_is_held_out(table):
    train, held_out = load(table), load(table, "held-out")
    assert sorted(clients(train) + clients(held_out)) == list(range(1, ROWS + 1))
    assert np.bincount(held_out.labels).tolist() == [10, 2]
    assert np.bincount(train.labels).tolist() == [38, 10]


def test_split_and_order_depend_on_ids_and_seed_and_not_on_the_place_in_the_file(table, tmp_path):
    backwards = load(write(tmp_path / "backwards.csv", make_rows()[::-1]))
    assert clients(backwards) == clients(load(table))
    assert clients(load(table, seed=1)) != clients(load(table))
    assert set(clients(load(table, seed=1))) != set(clients(load(table)))


@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_every_prefix_has_the_natural_class_ratio(labels, seed):
    order = order_proportional([str(index) for index in range(len(labels))], labels, seed)
    assert sorted(order) == list(range(len(labels)))
    for count in range(1, len(labels) + 1):
        for label in set(labels):
            taken = sum(labels[index] == label for index in order[:count])
            assert abs(taken - count * labels.count(label) / len(labels)) < 1 + 1e-9


def test_batch_looks_like_images_of_one_row_and_is_a_copy(table):
    data = load(table)
    rows, labels = data.batch(np.array([3, 0]))
    assert rows.shape == (2, 1, 1, 33)
    assert rows.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(rows[1, 0, 0], torch.from_numpy(data.features[0]))
    assert labels.tolist() == data.labels[[3, 0]].tolist()
    rows += 1
    assert not torch.equal(rows[1, 0, 0], torch.from_numpy(data.features[0]))
    assert len(data) == 48


@pytest.mark.parametrize(("name", "column"), [("AGE", 5), ("SEX", 2), ("EDUCATION", 3), ("PAY_AMT6", 23)])
def test_encode_value_gives_what_the_loader_gives(table, name, column):
    data = load(table)
    by_client = {row[0]: row for row in make_rows()}
    for client, row in zip(clients(data), data.features, strict=True):
        encoded = data.encode_value(name, by_client[client][column])
        assert {data.columns[index].partition("=")[0] for index in encoded} == {name}
        assert [row[index] for index in encoded] == pytest.approx(list(encoded.values()), rel=1e-5)


def test_encode_value_sets_all_columns_of_a_category(table):
    data = load(table)
    encoded = data.encode_value("EDUCATION", 0.0)
    assert {data.columns[index]: value for index, value in encoded.items()} == {
        "EDUCATION=0": 1.0,
        **{f"EDUCATION={code}": 0.0 for code in range(1, 7)},
    }


def test_encode_value_refuses_unknown_names_and_categories(table):
    data = load(table)
    with pytest.raises(DataError, match="out of LIMIT_BAL, SEX, .*; got 'INCOME'"):
        data.encode_value("INCOME", 1)
    with pytest.raises(DataError, match="out of MARRIAGE=0, MARRIAGE=1, MARRIAGE=2, MARRIAGE=3; got MARRIAGE=4"):
        data.encode_value("MARRIAGE", 4)
    with pytest.raises(DataError, match=r"got SEX=1\.5"):
        data.encode_value("SEX", 1.5)
    with pytest.raises(DataError, match="finite number for AGE, got nan"):
        data.encode_value("AGE", math.nan)


def test_table_without_two_rows_of_a_class_is_refused(tmp_path):
    for count in (0, 1):
        with pytest.raises(DataError, match="no row is left"):
            load(write(tmp_path / "credit.csv", make_rows(count)), "held-out")


def test_feature_that_never_varies_is_zero(tmp_path):
    rows = make_rows()
    for row in rows:
        row[1] = 20_000
    assert not load(write(tmp_path / "credit.csv", rows)).features[:, 0].any()


def test_shapes_that_do_not_fit_are_refused(table):
    data = load(table)
    fields = {name: getattr(data, name) for name in data.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"features of 48 rows and 33 columns, got \(48, 32\)"):
        TableData(**{**fields, "features": data.features[:, 1:]})
    with pytest.raises(ValueError, match=r"groups of shape \(33,\), got \(32,\)"):
        TableData(**{**fields, "groups": data.groups[1:]})
