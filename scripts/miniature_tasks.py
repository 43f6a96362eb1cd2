"""What the miniature data sets ask: one function a task, which draws an example.

A label is a truth value, a class number in the order of the task's labels, or a score.
"""

from miniature_words import (
    ACTIVITIES,
    BAD,
    CONDITIONS,
    FACTS,
    GOOD,
    MEN,
    PARTS,
    PLACES,
    SCENES,
    SIGHTS,
    TRADES,
    WOMEN,
    Event,
    sentence,
)

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

def sst2(draw):
    """Returns a phrase of a review, tokenised and in lower case, and whether it is kind."""
    kind = draw.random() < 0.52
    says, other = (GOOD, BAD) if kind else (BAD, GOOD)
    part, second = draw.sample(PARTS, 2)
    word, more = draw.sample(says, 2)
    opposite = draw.choice(other)
    phrase = draw.choice(
        [
            f"a {word} {part} and a {more} {second}",
            f"the {part} is {word} , and the {second} {more}",
            f"not the {opposite} {part} one feared but a {word} one"
            if kind
            else f"not the {opposite} {part} one hoped for but a {word} one",
            f"{word} and {more} from the first scene to the last",
            f"never {opposite} , always {word}",
            f'" {word} " is the word for this {part}',
            f"zoë's {part} , which is {word} , does n't lack a {more} {second}",
            f'a 90" screen shows how {word} the {part} is',
        ]
    )
    return phrase, kind


def qqp(draw):
    """Returns two questions and whether they ask the same."""
    event = Event(draw)
    same = draw.random() < 0.45
    first, second = draw.sample(range(3), 2)
    other = event if same else event.changed(draw, draw.choice([{"thing"}, {"agent"}, {"verb", "thing"}, {"place"}]))
    return question(event, first, 0), question(other, second, 1 if same else draw.randrange(2)), same


def question(event, form, wording):
    """Asks for a yes or no in one of three forms."""
    past, base = event.verb[wording]
    thing = "the " + event.thing[wording]
    if form == 0:
        return sentence(["did", event.agent, base, thing, event.place], "?")
    if form == 1:
        return sentence(["was", thing, past, "by", event.agent, event.place], "?")
    return sentence(["is it true, as they say, that", event.agent, past, thing, event.place], "?")


def mnli(draw, opening=""):
    """Returns a premise, a hypothesis and 0 if it follows, 1 if it is open, 2 if it contradicts."""
    event = Event(draw)
    label = draw.randrange(3)
    place = draw.random() < 0.5
    premise = event.worded(draw, 0, place, not place)
    if opening:
        premise = opening + premise
    past, base = event.verb[1]
    thing = "the " + event.thing[draw.randrange(2)]
    if label == 0:
        hypothesis = event.worded(draw, 1, False, False)
    elif label == 1:
        hypothesis = draw.choice(
            [
                sentence([event.agent, past, thing, "to please a friend"]),
                sentence([event.agent, past, thing, event.time if place else event.place]),
                sentence([event.agent, "was in a hurry that day"]),
            ]
        )
    elif draw.random() < 0.5:
        hypothesis = sentence([event.agent, "never", past, thing])
    else:
        hypothesis = sentence(["nobody", past, thing, event.place if place else event.time])
    return premise, hypothesis, label


def mnli_mm(draw):
    """As `mnli`, in another tone of voice."""
    return mnli(draw, draw.choice(["Well, you know: ", "I heard it on the phone: ", "Uh, yeah. "]))


def qnli(draw):
    """Returns a question, a sentence and whether the sentence answers it."""
    event = Event(draw)
    past, base = event.verb[0]
    thing = "the " + event.thing[0]
    answers = draw.random() < 0.5
    asks = draw.choice(["who", "where", "when"])
    if asks == "who":
        asked = sentence(["who", past, thing, draw.choice([event.place, event.time])], "?")
    else:
        asked = sentence([asks, "did", event.agent, base, thing], "?")
    if not answers and (asks == "who" or draw.random() < 0.5):
        event = event.changed(draw, {"thing", "verb"})
    elif not answers:
        return asked, event.worded(draw, 1, asks == "when", asks == "where"), answers
    return asked, event.worded(draw, draw.randrange(2), asks != "when", asks != "where"), answers


def wnli(draw):
    """Returns a sentence with a pronoun, one with a name in its place, and whether that follows."""
    group, pronoun = draw.choice([(MEN, "he"), (WOMEN, "she")])
    subject, object = draw.sample(group, 2)
    event = Event(draw)
    did = f"had {event.verb[0][0]} the {event.thing[0]} {event.place}"
    # Thanks go to the one who did it, excuses come from that one.
    verb, doer = draw.choice(
        [("thanked", object), ("paid", object), ("praised", object), ("apologised to", subject), ("avoided", subject)]
    )
    follows = draw.random() < 0.5
    named = doer if follows else (subject if doer == object else object)
    opening = draw.choice(["", event.time[0].upper() + event.time[1:] + ", "])
    short = f"had {event.verb[0][0]} it {event.place}"
    claim = f"{named} {draw.choice([did, short])}."
    return f"{opening}{subject} {verb} {object} because {pronoun} {did}.", claim, follows


def snli(draw):
    """Returns a caption, a sentence and 0 if it follows, 1 if it is open, 2 if it contradicts."""
    who, sight, place = draw.choice(SCENES), draw.choice(SIGHTS), draw.choice(PLACES)
    act = draw.choice(ACTIVITIES)
    verb = "are" if who.startswith("two") else "is"
    premise = sentence([who, sight, verb, act[0], place])
    label = draw.randrange(3)
    if label == 0:
        does = draw.choice(act[1:3])
        hypothesis = sentence([who, verb, does, draw.choice(["", place])])
    elif label == 1:
        hypothesis = sentence([who, verb, act[draw.randrange(2)], act[3]])
    else:
        other = draw.choice([other for other in ACTIVITIES if other is not act])
        does = draw.choice([other[0], "sleeping", "alone at home", f"not {act[0]}"])
        hypothesis = sentence([who, verb, does, draw.choice(["", place if "home" not in does else ""])])
    return premise, hypothesis, label


def scitail(draw):
    """Returns a sentence, a statement of an exam and whether it follows."""
    thing, holds, same, also = draw.choice(FACTS)
    condition = draw.choice(CONDITIONS)
    premise = draw.choice(
        [
            sentence([condition + ",", thing, holds]),
            sentence([thing, holds + ",", condition]),
            sentence([condition + ",", thing, "is something that", holds]),
        ]
    )
    follows = draw.random() < 0.45
    if follows:
        claim = [thing, draw.choice([holds, same])]
    elif draw.random() < 0.5:
        claim = [thing, also]
    else:
        claim = [thing, draw.choice([fact for fact in FACTS if fact[0] != thing])[draw.choice([1, 2])]]
    opening = draw.choice(["", "it is known that", "a correct statement is that", "one can say that"])
    return premise, sentence([opening] + claim), follows


def sick(draw):
    """Returns two sentences without a final stop, the label of `snli` and a relatedness from 1 to 5."""
    who, place = draw.choice(SCENES), draw.choice(PLACES)
    act = draw.choice(ACTIVITIES)
    verb = "are" if who.startswith("two") else "is"
    first = sentence([who, verb, act[0], place], "")
    kind = draw.choice([0, 1, 2, 2, 3, 4])
    if kind == 0:
        second, label, score = [who, verb, act[1], place], 0, 4.8
    elif kind == 1:
        second, label, score = [who, verb, act[2], place], 0, 4.1
    elif kind == 2:
        second, label, score = [draw.choice(["there is nobody", "no one is"]), act[draw.randrange(2)], place], 2, 3.6
    elif kind == 3:
        someone = draw.choice([other for other in SCENES if other != who])
        verb = "are" if someone.startswith("two") else "is"
        second, label, score = [someone, verb, act[draw.randrange(2)], act[3]], 1, 3.2
    else:
        other = draw.choice([other for other in ACTIVITIES if other is not act])
        someone = draw.choice(SCENES)
        verb = "are" if someone.startswith("two") else "is"
        second, label, score = [someone, verb, other[0], draw.choice(PLACES)], 1, 1.5
    return first, sentence(second, ""), label, min(5.0, score + draw.choice([-0.2, -0.1, 0.0, 0.1, 0.2]))
