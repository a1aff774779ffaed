from __future__ import annotations

import csv
import io
import math

from peft_dps.compare.report.csv_files import to_csv


def test_csv_reads_back():
    text = to_csv([{"name": 'a, "b"\nc', "score": 1 / 3, "count": 7}, {"name": "d", "score": math.nan, "count": None}])
    assert list(csv.reader(io.StringIO(text))) == [
        ["name", "score", "count"],
        ['a, "b"\nc', "0.333333", "7"],
        ["d", "", ""],
    ]
