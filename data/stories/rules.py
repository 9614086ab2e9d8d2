"""
Exact judges of the stories: which side of a principle does a story take, going by its words?

A story takes a side when it has words of that side and none of the other; with words of both or of neither it takes
none. Only the story is read: what the constitution names does not count. `hero` goes by which side has more words,
since a story about a girl may well say "he" of somebody else.
"""
import re

WORDS = {
    "pet": ("dog|dogs|doggy|puppy|puppies", "cat|cats|kitty|kitten|kittens"),
    "wild": ("monkey|monkeys", "lion|lions"),
    "wings": ("bird|birds|birdie", "fish|fishes"),
    "farm": ("cow|cows", "pig|pigs|piggy|piglet"),
    "toy": ("ball|balls", "car|cars"),
    "wheels": ("bike|bikes|bicycle", "truck|trucks"),
    "snack": ("banana|bananas", "milk"),
    "small": ("bunny|bunnies|rabbit|rabbits", "mouse|mice"),
    "ride": ("boat|boats", "train|trains"),
    "treat": ("cake|cakes", "cookie|cookies"),
}
HERO = ("girl|girls|she|her|hers|herself", "boy|boys|he|his|him|himself")


def count(words, text):
    return len(re.findall(rf"\b(?:{words})\b", text.lower()))


def mentions(name, response):
    """True, False: only the words of the positive, negative side are there; None: of both or of neither."""
    positive, negative = (count(words, response) > 0 for words in WORDS[name])
    return None if positive == negative else positive


def hero(query, response):
    girl, boy = (count(words, response) for words in HERO)
    return None if girl == boy else girl > boy


def pet(query, response):
    return mentions("pet", response)


def wild(query, response):
    return mentions("wild", response)


def wings(query, response):
    return mentions("wings", response)


def farm(query, response):
    return mentions("farm", response)


def toy(query, response):
    return mentions("toy", response)


def wheels(query, response):
    return mentions("wheels", response)


def snack(query, response):
    return mentions("snack", response)


def small(query, response):
    return mentions("small", response)


def ride(query, response):
    return mentions("ride", response)


def treat(query, response):
    return mentions("treat", response)


def in_world(query, response):
    """Could this be a piece of a story? A dozen words or more, plain characters only, and no going round in circles."""
    words = re.findall(r"[a-z']+", response.lower())
    odd = re.search("[^ -~\\n\u2018\u2019\u201c\u201d]|<", response)  # beyond ASCII only curly quotes
    fours = list(zip(words, words[1:], words[2:], words[3:]))
    return len(words) >= 12 and not odd and len(set(fours)) >= 0.7 * len(fours)
