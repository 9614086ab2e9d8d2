"""The toy world's grammar, and an exact judge for each of its twelve principles.

Every answer of the world is TEMPLATE with each slot filled by one word of one side, so a single
regular expression decides whether a text is an answer, and reading off the slots decides which side
of each principle it takes.
"""
import re

TEMPLATE = ("{register}, one {weather} {time} the {look} {first} and the {age} {second} "
            "{mood} {verb} in the {place} for {number} hours{tone} {ending}")

# slot: (words of the positive side, words of the negative side). Both sides have equally many
# words, so that a greedy model compares side with side and not a side of few likely words with a
# side of many unlikely ones.
SLOTS = {
    "register": (["Dear reader", "Honored guest"], ["Hey buddy", "Hi pal"]),
    "weather": (["clear", "mild"], ["rainy", "stormy"]),
    "time": (["morning", "afternoon"], ["night", "evening"]),
    "look": (["red", "blue"], ["tiny", "huge"]),
    "age": (["old", "ancient"], ["new", "young"]),
    "mood": (["happily", "merrily"], ["sadly", "glumly"]),
    "place": (["kitchen", "hall"], ["forest", "meadow"]),
    "number": (["three", "seven"], ["several", "many"]),
    "tone": (["!"], ["."]),
    "ending": (["Will you join them?", "Do you believe it?"],
               ["That is the story.", "So I was told."]),
}
# The verb is one slot that two principles share:
# activity picks the row (music or food), tense the column.
VERBS = {
    (True, True): ["sang", "danced"], (True, False): ["sing", "dance"],
    (False, True): ["cooked", "baked"], (False, False): ["cook", "bake"],
}


def compile_template():
    """TEMPLATE as a regular expression with one named group per slot."""
    choices = {slot: "|".join(map(re.escape, positive + negative))
               for slot, (positive, negative) in SLOTS.items()}
    choices |= {"verb": "|".join(sum(VERBS.values(), [])), "first": r"\w+", "second": r"\w+"}
    pieces = re.split(r"\{(\w+)\}", TEMPLATE)       # text, slot, text, slot, ..., text
    return re.compile("".join(f"(?P<{piece}>{choices[piece]})" if i % 2 else re.escape(piece)
                              for i, piece in enumerate(pieces)))


ANSWER = compile_template()


def things(query):
    """The two things a query names, in order, or None."""
    found = re.search(r"\bthe (\w+) and the (\w+)[.?]$", query.strip())
    return found.groups() if found else None


def parse(query, response):
    """{slot: word} for an answer of the world to this query, else None."""
    found = ANSWER.fullmatch(response.strip())
    return found.groupdict() if found and found.group("first", "second") == things(query) else None


def in_world(query, response):
    """Is the response, as a whole, an answer of this world to this query?"""
    return parse(query, response) is not None


def side(slot, query, response):
    """True: the slot's word is of the positive side, False: of the negative side,
    None: not an answer of the world."""
    words = parse(query, response)
    return None if words is None else words[slot] in SLOTS[slot][0]


def verb_side(axis, query, response):
    """The same for the verb: axis 0 is the activity, axis 1 the tense."""
    words = parse(query, response)
    if words is None:
        return None
    return next(key[axis] for key, verbs in VERBS.items() if words["verb"] in verbs)


def register(query, response):
    return side("register", query, response)      # formal | casual opening


def weather(query, response):
    return side("weather", query, response)       # fair | foul


def time(query, response):
    return side("time", query, response)          # day | night


def look(query, response):
    return side("look", query, response)          # color | size of the first thing


def age(query, response):
    return side("age", query, response)           # second thing old | new


def mood(query, response):
    return side("mood", query, response)          # happy | sad


def activity(query, response):
    return verb_side(0, query, response)          # music | food


def tense(query, response):
    return verb_side(1, query, response)          # past | present


def place(query, response):
    return side("place", query, response)         # indoors | outdoors


def number(query, response):
    return side("number", query, response)        # exact | vague


def tone(query, response):
    return side("tone", query, response)          # exclamation | period


def ending(query, response):
    return side("ending", query, response)        # question | statement
