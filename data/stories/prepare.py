"""
Writes train.jsonl and test.jsonl: openings of small stories, from templates and word lists.

`python data/stories/prepare.py` writes the same files every time. Training and test openings share
the templates but no adjective and no place. An opening sets a scene without anybody or anything in
it: who and what comes next is for the constitution to decide, where "there was a red box" would
have the model go on about the box.
"""
import json
import random
from pathlib import Path

TEMPLATES = [
    "It was a {adjective} {time} {place}.",
    "Once upon a time, it was a {adjective} {time} {place}.",
    "Once upon a time, {place}, it was a {adjective} {time}.",
    "It was time to play {place}. It was a {adjective} {time}.",
]
WORDS = {
    "train": dict(
        adjective=["good", "big", "nice", "lovely", "special", "fine", "slow", "lazy", "pretty",
                   "strange"],
        time=["day", "morning"],
        place=["on the hill", "near the river", "in the garden", "by the road", "in a small town",
               "near the old wall", "in the kitchen", "at the store", "in the big house",
               "on the farm", "at the beach", "in the grass", "at the lake", "by the old bridge",
               "on the playground"]),
    "test": dict(
        adjective=["fun", "quiet", "new", "great", "perfect", "happy"],
        time=["day", "morning"],
        place=["in the forest", "next to a pond", "at the park", "in the yard", "in the village",
               "at the zoo", "behind the school", "in a little cave"]),
}
COUNT = {"train": 960, "test": 160}


def openings(words, count):
    """`count` distinct openings in random order, the same ones every time."""
    rng, found = random.Random(1), {}
    while len(found) < count:
        chosen = {kind: rng.choice(choices) for kind, choices in words.items()}
        found[rng.choice(TEMPLATES).format(**chosen)] = None
    return list(found)


if __name__ == "__main__":
    for split, words in WORDS.items():
        path = Path(__file__).parent / f"{split}.jsonl"
        tmp = path.with_suffix(".jsonl.tmp")
        lines = [json.dumps({"query": opening}) + "\n" for opening in openings(words, COUNT[split])]
        tmp.write_text("".join(lines), encoding="utf-8")
        tmp.replace(path)
        print(f"{len(lines)} openings in {path}")
