#!/usr/bin/env python3
"""Writes tests/fixtures/metrics.json: metric values as scikit-learn and scipy compute them.

Needs scikit-learn 1.9.1, scipy 1.17.1 and numpy:

    pip install scikit-learn==1.9.1 scipy==1.17.1
    python scripts/make_metric_fixtures.py

Undefined values (NaN, or an input the library refuses) are written as null.
"""

import json
import math
import random
import warnings
from pathlib import Path

import scipy
import sklearn
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

TARGET = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "metrics.json"
DIGITS = 6


def number(value):
    value = float(value)
    return value if math.isfinite(value) else None


def class_case(name, label_count, predicted, actual):
    expected = {
        "accuracy": number(accuracy_score(actual, predicted)),
        "matthews": number(matthews_corrcoef(actual, predicted)),
    }
    if label_count == 2:
        expected["f1"] = number(f1_score(actual, predicted))
    return {
        "name": name,
        "label_count": label_count,
        "predicted": predicted,
        "actual": actual,
        "expected": expected,
    }


def correlation(function, predicted, actual):
    try:
        return number(function(predicted, actual).statistic)
    except ValueError:  # pearsonr refuses fewer than two examples
        return None


def value_case(name, predicted, actual):
    return {
        "name": name,
        "predicted": predicted,
        "actual": actual,
        "expected": {
            "pearson": correlation(pearsonr, predicted, actual),
            "spearman": correlation(spearmanr, predicted, actual),
        },
    }


def class_cases(draw):
    def noisy(label_count, size, right):
        actual = [draw.randrange(label_count) for _ in range(size)]
        predicted = [a if draw.random() < right else draw.randrange(label_count) for a in actual]
        return predicted, actual

    yield class_case("two classes", 2, *noisy(2, 60, 0.7))
    yield class_case("two classes, chance", 2, *noisy(2, 60, 0.0))
    skewed = [1 if draw.random() < 0.95 else 0 for _ in range(60)]
    yield class_case("two classes, skewed", 2, [draw.choice([a, 1]) for a in skewed], skewed)
    yield class_case("three classes", 3, *noisy(3, 80, 0.6))
    yield class_case("five classes", 5, *noisy(5, 80, 0.5))
    yield class_case("three classes, one never seen", 3, [0, 2, 2, 0, 0], [0, 2, 0, 0, 2])
    yield class_case("all right", 2, [0, 1, 1, 0], [0, 1, 1, 0])
    yield class_case("all wrong", 2, [1, 0, 0, 1], [0, 1, 1, 0])
    yield class_case("one class predicted", 2, [1] * 6, [0, 1, 1, 0, 1, 1])
    yield class_case("negatives predicted only", 2, [0] * 6, [0, 1, 1, 0, 1, 1])
    yield class_case("one class in the gold labels", 2, [0, 1, 1, 0], [1, 1, 1, 1])
    yield class_case("one class on both sides", 2, [1, 1, 1], [1, 1, 1])
    yield class_case("no positives on either side", 2, [0, 0, 0], [0, 0, 0])
    yield class_case("one example, right", 2, [1], [1])
    yield class_case("one example, wrong", 2, [0], [1])
    yield class_case("two examples", 2, [0, 1], [1, 1])


def value_cases(draw):
    def normal(size, offset=0.0, scale=1.0):
        return [round(offset + scale * draw.gauss(0, 1), DIGITS) for _ in range(size)]

    def near(values, noise, slope=1.0):
        return [round(slope * v + noise * draw.gauss(0, 1), DIGITS) for v in values]

    gold = normal(60, 2.5, 1.0)
    yield value_case("correlated", near(gold, 0.5), gold)
    yield value_case("anticorrelated", near(gold, 0.5, -1.0), gold)
    yield value_case("independent", normal(60), normal(60))
    tied = [draw.randrange(0, 11) / 2 for _ in range(60)]
    yield value_case("ties on both sides", [round(v) for v in near(tied, 1.0)], tied)
    yield value_case("ties in the gold scores", near(tied, 1.0), tied)
    yield value_case("two values only", [0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0])
    yield value_case("constant predictions", [2.5] * 8, normal(8))
    yield value_case("constant gold scores", normal(8), [3.0] * 8)
    yield value_case("constant on both sides", [1.0] * 4, [1.0] * 4)
    yield value_case("one example", [1.0], [2.0])
    yield value_case("two examples, same order", [0.1, 0.7], [3.0, 3.2])
    yield value_case("two examples, opposite order", [0.1, 0.7], [3.2, 3.0])
    yield value_case("two examples, tied", [0.1, 0.1], [3.2, 3.0])
    yield value_case("three examples", [1.0, 2.0, 4.0], [0.0, 3.0, 1.0])
    yield value_case("exact line", [2.0 * v + 1.0 for v in tied], tied)
    far = normal(60, 1e8, 1.0)
    yield value_case("large offset", [round(v + draw.gauss(0, 0.5), DIGITS) for v in far], far)
    yield value_case("large scale", [v * 1e150 for v in near(gold, 0.5)], [v * 1e150 for v in gold])
    yield value_case("small scale", [v * 1e-150 for v in near(gold, 0.5)], [v * 1e-150 for v in gold])
    yield value_case("negative zero ties with zero", [-0.0, 0.0, 1.0, 2.0], [1.0, 2.0, 0.5, 3.0])


def main():
    warnings.simplefilter("ignore")  # the degenerate cases are meant
    draw = random.Random(20210915)
    groups = {"classes": class_cases(draw), "values": value_cases(draw)}
    # One case a line keeps the file readable and its diffs small.
    parts = [f'"made_by": "scikit-learn {sklearn.__version__}, scipy {scipy.__version__}"']
    for group, cases in groups.items():
        lines = ",\n    ".join(json.dumps(case, allow_nan=False) for case in cases)
        parts.append(f"{json.dumps(group)}: [\n    {lines}\n  ]")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
