"""
Exact judges of the stories: which side of a principle does a story take, going by its words?

A story takes a side when it has words of that side and none of the other; with words of both or of
neither it takes none. Only the story is read: what the constitution names does not count. `hero`
goes by which side has more words, since a story about a girl may well say "he" of somebody else.
"""
import re

HERO = ("girl|girls|she|her|hers|herself", "boy|boys|he|his|him|himself")


def count(words, text):
    return len(re.findall(rf"\b(?:{words})\b", text.lower()))


def takes_side(positive, negative):
    """A rule: True, False where only the words of the positive, negative side are there;
    None: of both or of neither."""
    def rule(query, response):
        pro, contra = (count(words, response) > 0 for words in (positive, negative))
        return None if pro == contra else pro
    return rule


pet = takes_side("dog|dogs|doggy|puppy|puppies", "cat|cats|kitty|kitten|kittens")
wild = takes_side("monkey|monkeys", "lion|lions")
wings = takes_side("bird|birds|birdie", "fish|fishes")
farm = takes_side("cow|cows", "pig|pigs|piggy|piglet")
toy = takes_side("ball|balls", "car|cars")
wheels = takes_side("bike|bikes|bicycle", "truck|trucks")
snack = takes_side("banana|bananas", "milk")
small = takes_side("bunny|bunnies|rabbit|rabbits", "mouse|mice")
ride = takes_side("boat|boats", "train|trains")
treat = takes_side("cake|cakes", "cookie|cookies")


def hero(query, response):
    girl, boy = (count(words, response) for words in HERO)
    return None if girl == boy else girl > boy


def in_world(query, response):
    """Could this be a piece of a story?
    A dozen words or more, plain characters only, and no going round in circles."""
    words = re.findall(r"[a-z']+", response.lower())
    # beyond ASCII only curly quotes
    odd = re.search("[^ -~\\n\u2018\u2019\u201c\u201d]|<", response)
    fours = list(zip(words, words[1:], words[2:], words[3:]))
    return len(words) >= 12 and not odd and len(set(fours)) >= 0.7 * len(fours)
