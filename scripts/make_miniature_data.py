#!/usr/bin/env python3
"""Writes the miniature data sets in data/: four tasks in the file layouts of GLUE.

    python scripts/make_miniature_data.py            # writes the files
    python scripts/make_miniature_data.py --check    # fails if they differ

Every sentence is put together here from word lists, so nothing is anyone else's text. A small
event (who did what to which thing, where and when) is drawn and worded in several ways:

  CoLA   a correct sentence, or one with a broken agreement, verb form or word order
  RTE    a premise, and a hypothesis that states part of it or contradicts it
  MRPC   two wordings of one event, or of two events that differ in a fact
  STS-B  two events, scored from 0 to 5 by the parts they share

Only the standard library is used, and the same seed gives the same bytes.
"""

import argparse
import random
import sys
from pathlib import Path

SEED = 20210915
SIZES = {"train": 320, "dev": 120, "test": 40}
DATA = Path(__file__).resolve().parent.parent / "data"

MEN = ["Peter", "Björn", "Tom", "Omar", "Daniel", "Łukasz", "Henry", "José"]
WOMEN = ["Anna", "Zoë", "Maria", "Renée", "Grace", "Nina", "Sofia", "Aylin"]
TRADES = ["baker", "teacher", "nurse", "farmer", "pilot", "gardener", "plumber", "librarian"]
PEOPLE = MEN + WOMEN + [f"the {trade}" for trade in TRADES] + ["Anna's brother", "Tom's neighbour"]

# Two words of one meaning, each as past form (and participle) and base form.
VERBS = [
    [("repaired", "repair"), ("fixed", "fix")],
    [("bought", "buy"), ("purchased", "purchase")],
    [("cleaned", "clean"), ("washed", "wash")],
    [("found", "find"), ("discovered", "discover")],
    [("inspected", "inspect"), ("examined", "examine")],
    [("lost", "lose"), ("misplaced", "misplace")],
    [("moved", "move"), ("shifted", "shift")],
    [("sold", "sell"), ("traded away", "trade away")],
    [("painted", "paint"), ("coloured", "colour")],
]

THINGS = [
    ["bicycle", "bike"],
    ["sofa", "couch"],
    ["car", "automobile"],
    ["parcel", "package"],
    ["rug", "carpet"],
    ["cap", "hat"],
    ["lantern", "lamp"],
    ["suitcase", "travel bag"],
    ["rowing boat", "small boat"],
    ["piano", "old piano"],
    ["wooden ladder", "ladder"],
    ['19" screen', '19" monitor'],
    ['"Blue Harbour" poster', 'poster of "Blue Harbour"'],
    ["birdcage", "cage for birds"],
]
PLACES = [
    "in the garden",
    "at the station",
    "near the harbour",
    "behind the school",
    "outside the museum",
    "beside the river",
    "at the market",
    "in the café",
]
TIMES = [
    "on Monday",
    "last night",
    "before lunch",
    "yesterday morning",
    "in March",
    "after the storm",
    "at noon",
    "two weeks ago",
]


def sentence(words, end="."):
    """Capitalises the first letter and closes the sentence."""
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + end


class Event:
    """Who did what to which thing, where and when; verb and thing are rows of synonyms."""

    SLOTS = ("agent", "verb", "thing", "place", "time")
    CHOICES = dict(agent=PEOPLE, verb=VERBS, thing=THINGS, place=PLACES, time=TIMES)

    def __init__(self, draw):
        for slot in self.SLOTS:
            setattr(self, slot, draw.choice(self.CHOICES[slot]))

    def changed(self, draw, slots):
        """Returns a copy that differs in exactly the named slots."""
        other = Event(draw)
        for slot in self.SLOTS:
            if slot not in slots:
                setattr(other, slot, getattr(self, slot))
            while slot in slots and getattr(other, slot) == getattr(self, slot):
                setattr(other, slot, draw.choice(self.CHOICES[slot]))
        return other

    def worded(self, draw, wording, place=True, time=True, form=None):
        """Says the event with the first or second synonyms (wording 0 or 1)."""
        past, thing = self.verb[wording][0], "the " + self.thing[wording]
        place = self.place if place else ""
        time = self.time if time else ""
        form = form or draw.choice(["plain", "fronted", "passive"])
        if form == "fronted" and time:
            return sentence([time + ",", self.agent, past, thing, place])
        if form == "passive":
            return sentence([thing, "was", past, "by", self.agent, place, time])
        return sentence([self.agent, past, thing, place, time])


def cola(draw):
    """Returns a sentence, its label and the mark that CoLA's authors put on bad examples."""
    good = draw.random() < 0.6
    event = Event(draw)
    past, base = event.verb[0]
    thing = event.thing[0]
    kind = draw.randrange(6)
    if kind == 0:  # word order
        words = [event.agent, past, "the " + thing, event.place]
        if not good:
            words = [event.agent, thing, "the", past, event.place]
    elif kind == 1:  # number of subject and verb
        trade = draw.choice(TRADES)
        ending = "" if good else "s"
        words = [draw.choice(["the two", "these", "all the"]), trade + "s", base + ending, "the " + thing, event.place]
    elif kind == 2:  # verb form in a question
        words = ["did", event.agent, base if good else past, "the " + thing, event.place]
        return sentence(words, "?"), good, "" if good else "*"
    elif kind == 3:  # reflexive pronoun
        name, right, wrong = draw.choice(
            [(name, "himself", "herself") for name in MEN] + [(name, "herself", "himself") for name in WOMEN]
        )
        words = [event.time + ",", name, draw.choice(["blamed", "praised", "hurt", "saw"])]
        words += [right if good else wrong, event.place]
    elif kind == 4:  # verb form after an auxiliary
        auxiliary = draw.choice(["has", "had"])
        words = [event.agent, auxiliary, past if good else base, "the " + thing, event.place]
    else:  # a missing or doubled word
        words = ["the " + thing, "was", past, "by", event.agent, event.place]
        if not good:
            words = draw.choice([words[:1] + words[2:], words[:3] + [past] + words[3:]])
    return sentence(words), good, "" if good else "*"


def rte(draw):
    """Returns a premise, a hypothesis and whether the second follows from the first."""
    event = Event(draw)
    premise = event.worded(draw, 0)
    follows = draw.random() < 0.5
    if follows:
        place = draw.random() < 0.4
        return premise, event.worded(draw, draw.randrange(2), place, not place), follows
    kind = draw.randrange(4)
    if kind == 0:
        base = event.verb[0][1]
        return premise, sentence([event.agent, "did not", base, "the " + event.thing[0]]), follows
    other = event.changed(draw, [{"thing"}, {"agent"}, {"thing", "verb"}][kind - 1])
    place = draw.random() < 0.4
    return premise, other.worded(draw, draw.randrange(2), place, not place), follows


def mrpc(draw):
    """Returns two sentences and whether they say the same."""
    event = Event(draw)
    same = draw.random() < 0.62
    forms = ["plain", "passive"] if draw.random() < 0.5 else ["fronted", "plain"]
    if draw.random() < 0.5:
        forms.reverse()
    first = event.worded(draw, 0, form=forms[0])
    if not same:
        event = event.changed(draw, draw.choice([{"thing", "place"}, {"agent", "verb"}, {"thing", "time"}]))
    return first, event.worded(draw, 1 if same else draw.randrange(2), form=forms[1]), same


def stsb(draw):
    """Returns two sentences and their similarity from 0 to 5."""
    weights = dict(agent=1.0, verb=1.2, thing=1.4, place=0.8, time=0.6)
    order = sorted(Event.SLOTS, key=lambda _: draw.random())
    different = set(order[: draw.randrange(len(order) + 1)])
    event = Event(draw)
    first, wording = event.worded(draw, 0), draw.randrange(2)
    second = event.changed(draw, different).worded(draw, wording)
    score = sum(weight for slot, weight in weights.items() if slot not in different)
    # Raters seldom agree to the last fifth of a point.
    score += draw.choice([-0.2, 0.0, 0.0, 0.2])
    return first, second, min(5.0, max(0.0, score))


def distinct(make, draw):
    """Yields what `make` makes, each text or pair of texts once."""
    seen = set()
    while True:
        example = make(draw)
        texts = tuple(part for part in example if isinstance(part, str) and part not in ("", "*"))
        if texts not in seen and len(set(texts)) == len(texts):
            seen.add(texts)
            yield example


def splits(make, name):
    draw = random.Random(f"{SEED} {name}")
    examples = distinct(make, draw)
    return {split: [next(examples) for _ in range(size)] for split, size in SIZES.items()}


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


def labelled(columns, rows, split):
    """A table whose last column, the label, is left out of the test file."""
    keep = len(columns) - (split == "test")
    return table(columns[:keep], [row[:keep] for row in rows])


def table(columns, rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in [columns] + rows)


TASKS = {
    "CoLA": (cola, cola_file),
    "RTE": (rte, rte_file),
    "MRPC": (mrpc, mrpc_file),
    "STS-B": (stsb, stsb_file),
}


def main():
    parser = argparse.ArgumentParser(description="Writes the miniature data sets in data/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--out", type=Path, default=DATA, help="the folder to write to (default: data/)")
    arguments = parser.parse_args()
    stale = []
    for task, (make, file) in TASKS.items():
        for split, examples in splits(make, task).items():
            path = arguments.out / task / f"{split}.tsv"
            content = file(split, examples).encode("utf-8")
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
