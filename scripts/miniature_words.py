"""The words of the miniature data sets, and small events put together from them."""

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


# What reviews say of a part of a film, kindly and not.
GOOD = ["charming", "moving", "witty", "superb", "delightful", "gripping", "honest", "warm", "clever", "graceful"]
BAD = ["dull", "tedious", "clumsy", "shallow", "lifeless", "predictable", "noisy", "muddled", "stale", "cold"]
PARTS = ["story", "script", "camera work", "ending", "cast", "music", "dialogue", "pace", "remake", "café scene"]

# People in pictures, and what they do: the act, a second wording, what follows from it, what it may be for.
SCENES = ["a man", "a woman", "a boy", "a girl", "two children", "an old man", "a young woman", "a group of friends"]
ACTIVITIES = [
    ("playing a guitar", "strumming a guitar", "making music", "at a wedding"),
    ("riding a bicycle", "cycling", "moving", "to school"),
    ("slicing an onion", "cutting an onion", "preparing food", "for a large party"),
    ("kicking a ball", "shooting a ball", "playing outside", "to win a cup"),
    ("reading a newspaper", "looking through a newspaper", "reading", "about the election"),
    ("climbing a rock", "scaling a rock", "climbing", "for the first time"),
    ("painting a fence", "giving a fence a coat of paint", "working", "for a neighbour"),
    ("feeding a dog", "giving food to a dog", "near an animal", "before a long walk"),
    ("swimming in a lake", "having a swim in a lake", "in the water", "to train for a race"),
    ('holding a "for sale" sign', 'carrying a "for sale" sign', "holding something", "to earn some money"),
    ("selling crêpes", "offering crêpes for sale", "selling food", "to tourists"),
    ("waiting for a bus", "standing at a bus stop", "waiting", "to visit an aunt"),
]
SIGHTS = ["in a red coat", "with a backpack", "beside a white wall", "on a sunny day", "near some trees", "in the rain"]

# Facts of a school book: the thing, what holds of it, the same in other words, and something else that holds of it.
FACTS = [
    ("the heart", "pumps blood through the body", "keeps the blood moving", "is a muscle"),
    ("a leaf", "takes in light to make sugar", "turns light into food", "loses water through small holes"),
    ("iron", "rusts in damp air", "reacts with oxygen and water", "is drawn to a magnet"),
    ("a lung", "takes oxygen from the air", "brings oxygen into the blood", "gets rid of carbon dioxide"),
    ("a volcano", "throws out melted rock", "releases lava", "can build an island"),
    ("the moon", "reflects the light of the sun", "gives off no light of its own", "causes the tides"),
    ("a root", "holds a plant in the soil", "anchors a plant", "takes up water"),
    ("ice", "floats on water", "is less dense than water", "melts at 0 degrees"),
    ("copper", "carries electric current well", "is a good conductor", "is used in coins"),
    ("a cell", "is the smallest unit of life", "is what all living things are made of", "has a membrane"),
    ("a lens", "bends rays of light", "refracts light", "is found in the eye"),
    ("yeast", "makes dough rise", "gives off gas in dough", "is a fungus"),
]
CONDITIONS = [
    "according to the textbook",
    "as every pupil learns",
    'in the chapter called "Matter"',
    "as Anna's experiment shows",
    "under normal conditions",
    "in most cases",
    "as Łukasz explained in class",
    "scientists agree",
]
