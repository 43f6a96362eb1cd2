#!/usr/bin/env python3
"""Writes the miniature data sets in data/, in the file layouts of the real ones.

    python scripts/make_miniature_data.py            # writes the files
    python scripts/make_miniature_data.py --check    # fails if they differ

Every sentence is put together here from word lists, so nothing is anyone else's text. A small
event (who did what to which thing, where and when) is drawn and worded in several ways:

  CoLA     a correct sentence, or one with a broken agreement, verb form or word order
  RTE      a premise, and a hypothesis that states part of it or contradicts it
  MRPC     two wordings of one event, or of two events that differ in a fact
  STS-B    two events, scored from 0 to 5 by the parts they share
  SST-2    a phrase that praises a part of a film, or finds fault with it
  QQP      two questions about one event, or about two that differ in a fact
  MNLI     a premise, and a hypothesis that follows, is open or contradicts; AX likewise
  QNLI     a question, and a sentence that answers it or does not
  WNLI     a pronoun, and the person it stands for or the other one
  SNLI     a caption, and a sentence that follows, is open or contradicts
  SciTail  a fact, and a statement that follows from it or does not
  SICK     two captions, with a label as in SNLI and a relatedness from 1 to 5

Only the standard library is used, and the same seed gives the same bytes.
"""

import argparse
import random
import sys
from pathlib import Path

import miniature_tasks as tasks

SEED = 20210915
SIZES = {"train": 320, "dev": 120, "test": 40}
DATA = Path(__file__).resolve().parent.parent / "data"

ENTAILMENT = ["entailment", "neutral", "contradiction"]


def distinct(make, draw):
    """Yields what `make` makes, each text or pair of texts once."""
    seen = set()
    while True:
        example = make(draw)
        texts = tuple(part for part in example if isinstance(part, str) and part not in ("", "*"))
        if texts not in seen and len(set(texts)) == len(texts):
            seen.add(texts)
            yield example


def splits(make, name, sizes=SIZES):
    draw = random.Random(f"{SEED} {name}")
    examples = distinct(make, draw)
    return {split: [next(examples) for _ in range(size)] for split, size in sizes.items()}


def table(columns, rows, end="\n"):
    return "".join("\t".join(map(str, row)) + end for row in ([columns] if columns else []) + rows)


def labelled(columns, rows, split):
    """A table whose last column, the label, is left out of the test file."""
    keep = len(columns) - (split == "test")
    return table(columns[:keep], [row[:keep] for row in rows])


def glue(make, name, file):
    """The three files of a GLUE task."""
    return {f"{split}.tsv": file(split, examples) for split, examples in splits(make, name).items()}


def cola_file(split, examples):
    if split == "test":
        return table(["index", "sentence"], [[i, text] for i, (text, _, _) in enumerate(examples)])
    rows = [["mini", int(good), mark, text] for text, good, mark in examples]
    # GLUE's dev file has no final newline.
    return "\n".join("\t".join(map(str, row)) for row in rows) + ("" if split == "dev" else "\n")


def rte_file(split, examples):
    names = {True: "entailment", False: "not_entailment"}
    rows = [[i, a, b, names[follows]] for i, (a, b, follows) in enumerate(examples)]
    return labelled(["index", "sentence1", "sentence2", "label"], rows, split)


def mrpc_file(split, examples):
    first = "index" if split == "test" else "Quality"
    rows = [
        [i if split == "test" else int(same), 1000 + 2 * i, 1001 + 2 * i, a, b]
        for i, (a, b, same) in enumerate(examples)
    ]
    mark = "" if split == "test" else "\ufeff"
    return mark + table([first, "#1 ID", "#2 ID", "#1 String", "#2 String"], rows)


def stsb_file(split, examples):
    columns = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
    rows = []
    for i, (a, b, score) in enumerate(examples):
        # Both spellings occur in the real files.
        score = f"{score:.0f}" if score == int(score) and i % 2 else f"{score:.3f}"
        rows.append([i, "main-miniature", "templates", "2021", f"{i:04d}", "none", "none", a, b, score])
    return labelled(columns, rows, split)


def sst2_file(split, examples):
    if split == "test":
        return table(["index", "sentence"], [[i, text] for i, (text, _) in enumerate(examples)])
    # Training phrases end in a space.
    space = " " if split == "train" else ""
    return table(["sentence", "label"], [[text + space, int(kind)] for text, kind in examples])


def qqp_file(split, examples):
    if split == "test":
        return table(["id", "question1", "question2"], [[i, a, b] for i, (a, b, _) in enumerate(examples)])
    rows = [[i, 2 * i + 1, 2 * i + 2, a, b, int(same)] for i, (a, b, same) in enumerate(examples)]
    if split == "train":
        # A pair torn by a line end, and one whose second question is empty.
        rows[100:100] = [[900, 1801, 1802, '"Who said'], ["that?", "Who said it?", 1]]
        rows[200][4], rows[200][5] = "", 0
    return table(["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], rows)


def qnli_file(split, examples):
    names = {True: "entailment", False: "not_entailment"}
    rows = [[i, asked, text, names[answers]] for i, (asked, text, answers) in enumerate(examples)]
    return labelled(["index", "question", "sentence", "label"], rows, split)


def wnli_file(split, examples):
    rows = [[i, a, b, int(follows)] for i, (a, b, follows) in enumerate(examples)]
    return labelled(["index", "sentence1", "sentence2", "label"], rows, split)


# Stand-ins for the parse trees of the inference sets.
PARSES = ["( ( a ) b )", "( ( c ) d )", "(ROOT (S (NP a) (VP b)))", "(ROOT (S (NP c) (VP d)))"]
PARSE_COLUMNS = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse".split()


def votes(label, count):
    """What annotators said: the majority, and one who saw it otherwise."""
    return [ENTAILMENT[label]] * (count - 1) + [ENTAILMENT[(label + count) % 3]] if count > 1 else [ENTAILMENT[label]]


def mnli_file(genre, count, examples):
    """A file with `count` votes a pair; a test file, which has none, has no label either."""
    columns = ["index", "promptID", "pairID", "genre"] + PARSE_COLUMNS + ["sentence1", "sentence2"]
    columns += [f"label{number}" for number in range(1, count + 1)] + (["gold_label"] if count else [])
    rows = []
    for i, (a, b, label) in enumerate(examples):
        row = [i, 5000 + i, f"{5000 + i}{'enc'[label]}", genre] + PARSES + [a, b]
        rows.append(row + (votes(label, count) + [ENTAILMENT[label]] if count else []))
    return table(columns, rows)


def mnli_files():
    matched = splits(tasks.mnli, "MNLI")
    mismatched = splits(tasks.mnli_mm, "MNLI-mm", {split: SIZES[split] for split in ("dev", "test")})
    files = {"train.tsv": mnli_file("letters", 1, matched["train"])}
    for kind, genre, examples in (("matched", "letters", matched), ("mismatched", "telephone", mismatched)):
        files[f"dev_{kind}.tsv"] = mnli_file(genre, 5, examples["dev"])
        files[f"test_{kind}.tsv"] = mnli_file(genre, 0, examples["test"])
    return files


def ax_files():
    rows = splits(tasks.mnli, "AX", {"test": SIZES["test"]})["test"]
    text = table(["index", "sentence1", "sentence2"], [[i, a, b] for i, (a, b, _) in enumerate(rows)])
    return {"diagnostic.tsv": text.removesuffix("\n")}


def snli_files():
    labels = [f"label{number}" for number in range(1, 6)]
    columns = ["gold_label"] + PARSE_COLUMNS + ["sentence1", "sentence2", "captionID", "pairID"] + labels
    # Every 41st pair has no majority; the others are as many as in the other sets.
    sizes = {split: size + size // 40 for split, size in SIZES.items()}
    files = {}
    for split, examples in splits(tasks.snli, "SNLI", sizes).items():
        rows = []
        for i, (a, b, label) in enumerate(examples):
            # Most training pairs were seen by their author only.
            seen = [ENTAILMENT[label], "", "", "", ""] if split == "train" and i % 4 else votes(label, 5)
            gold = ENTAILMENT[label]
            if i % 41 == 40:
                gold, seen = "-", ["neutral", "entailment", "contradiction", "neutral", "entailment"]
            rows.append([gold] + PARSES + [a, b, f"{7000 + i}.jpg#0", f"{7000 + i}.jpg#0r1{'enc'[label]}"] + seen)
        files[f"snli_1.0_{split}.txt"] = table(columns, rows)
    return files


def scitail_files():
    names = {True: "entails", False: "neutral"}
    files = {}
    for split, examples in splits(tasks.scitail, "SciTail").items():
        files[f"tsv_format/scitail_1.0_{split}.tsv"] = table([], [[a, b, names[label]] for a, b, label in examples])
    return files


def sick_files():
    columns = "pair_ID sentence_A sentence_B entailment_label relatedness_score entailment_AB entailment_BA"
    columns += " sentence_A_original sentence_B_original sentence_A_dataset sentence_B_dataset SemEval_set"
    names = {"train": "TRAIN", "dev": "TRIAL", "test": "TEST"}
    parts = splits(tasks.sick, "SICK")
    rows = [[*example, names[split]] for split, examples in parts.items() for example in examples]
    # The real file mixes the three parts.
    random.Random(f"{SEED} SICK order").shuffle(rows)
    lines = []
    for i, (a, b, label, score, part) in enumerate(rows):
        way = ["entails", "neutral", "contradicts"][label]
        score = f"{score:.1f}".removesuffix(".0")
        sources = [a + ".", b + ".", "MINIATURE", "MINIATURE"]
        ways = [f"A_{way}_B", "B_neutral_A" if label == 0 else f"B_{way}_A"]
        space = " " if i % 50 == 7 else ""
        lines.append([i + 1, a, b + space, ENTAILMENT[label].upper(), score, *ways, *sources, part])
    return {"SICK.txt": table(columns.split(), lines, "\r\n").removesuffix("\r\n")}


TASKS = {
    "CoLA": lambda: glue(tasks.cola, "CoLA", cola_file),
    "RTE": lambda: glue(tasks.rte, "RTE", rte_file),
    "MRPC": lambda: glue(tasks.mrpc, "MRPC", mrpc_file),
    "STS-B": lambda: glue(tasks.stsb, "STS-B", stsb_file),
    "SST-2": lambda: glue(tasks.sst2, "SST-2", sst2_file),
    "QQP": lambda: glue(tasks.qqp, "QQP", qqp_file),
    "MNLI": mnli_files,
    "QNLI": lambda: glue(tasks.qnli, "QNLI", qnli_file),
    "WNLI": lambda: glue(tasks.wnli, "WNLI", wnli_file),
    "AX": ax_files,
    "SNLI": snli_files,
    "SciTail": scitail_files,
    "SICK": sick_files,
    # Tells the program that data/ holds no real data, and that what was fetched goes before it.
    ".": lambda: {"MINIATURE": "The data sets in this folder are generated; see README.md.\n"},
}


def main():
    parser = argparse.ArgumentParser(description="Writes the miniature data sets in data/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--out", type=Path, default=DATA, help="the folder to write to (default: data/)")
    arguments = parser.parse_args()
    stale = []
    for task, files in TASKS.items():
        for name, text in files().items():
            path = arguments.out / task / name
            content = text.encode("utf-8")
            if arguments.check:
                if not path.is_file() or path.read_bytes() != content:
                    stale.append(str(path))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    if stale:
        sys.exit("not what scripts/make_miniature_data.py writes: " + ", ".join(stale))


if __name__ == "__main__":
    main()
