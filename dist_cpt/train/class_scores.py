"""Accuracy and macro-F1 from counts of (true class, predicted class)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def class_scores(confusion: Sequence[int]) -> dict[str, float]:
    """`accuracy` and `macro_f1` of counts [C * C], true class first, in C order; NaN without any text.

    A class's F1 is 2 TP / (2 TP + FP + FN); macro-F1 is the plain mean over the classes that occur, as truth or as
    prediction.
    """
    classes = math.isqrt(len(confusion))
    rows = [confusion[start : start + classes] for start in range(0, len(confusion), classes)]
    total = sum(confusion)
    if not total:
        return {"accuracy": math.nan, "macro_f1": math.nan}
    hits = [rows[c][c] for c in range(classes)]
    seen = [sum(rows[c]) + sum(row[c] for row in rows) for c in range(classes)]  # 2 TP + FP + FN
    f1 = [2 * hit / all_ for hit, all_ in zip(hits, seen, strict=True) if all_]
    return {"accuracy": sum(hits) / total, "macro_f1": sum(f1) / len(f1)}
