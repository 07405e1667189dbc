"""A small file of credit-card clients, whose ages tell who they are."""

import csv

import numpy as np

from keyed_xai.data import load_table
from keyed_xai.data.credit_default import NAMES

TARGET = "default.payment.next.month"
HEADER = ["ID", *NAMES, TARGET]
ROWS = 60


def make_rows(count=ROWS):
    """Return rows as in the real file; AGE tells the ID, and every fifth client defaults."""
    generator = np.random.default_rng(0)
    rows = []
    for client in range(1, count + 1):
        money = generator.integers(-500, 90_000, 12).tolist()
        months = generator.integers(-2, 9, 6).tolist()
        codes = [1 + client % 2, client % 7, client % 4]
        rows.append([client, money[0] + 1000, *codes, client, *months, *money, int(client % 5 == 0)])
    return rows


def write(path, rows=None, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(make_rows() if rows is None else rows)])
    return path


def load(path, split="train", **options):
    return load_table(f"credit-default:{path}", split=split, **options)


def clients(data):
    """Return the rows' IDs, from their AGE."""
    age = data.columns.index("AGE")
    return np.round(data.features[:, age] * data.std[age] + data.mean[age]).astype(int).tolist()
