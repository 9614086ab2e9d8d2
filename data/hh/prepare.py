"""Makes train.jsonl and test.jsonl: what people first ask in the helpful-base and harmless-base
dialogues of HH-RLHF.

    python data/hh/prepare.py                 downloads four files, about 31 MB;
                                              if it fails, run it again
    python data/hh/prepare.py --source=helpful-train.jsonl,harmless-train.jsonl,helpful-test.jsonl
    python data/hh/prepare.py --official      fetches the authors' prompts and principles;
                                              then --task=data/hh/official

The name of a local file (.jsonl or .jsonl.gz), or of its folder, says helpful or harmless; a file
with test or valid in its name feeds test.jsonl. A query's "focus" is the principle that every
constitution but the first negates: that of its own set, as in the paper. The two sets take turns,
so the first 500 test queries are 250 of each, and each half of train.jsonl is mixed. Until this
has run, both files hold a few invented requests.
"""
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tldr"))
from sources import (BadInput, constants, download, first_turn, main, read_rows, same, side,
                     write_official, write_queries)

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
FILES = {
    "helpful-base/train.jsonl.gz":
        "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "harmless-base/train.jsonl.gz": "",  # not known: only printed
    "helpful-base/test.jsonl.gz":
        "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "harmless-base/test.jsonl.gz":
        "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
}
# The authors' released repository has TL;DR only;
# this experiment is in the repository they developed it in.
AUTHORS = ("https://raw.githubusercontent.com/janphilippfranken/typo/"
           "41854deef934c3c8a2d0de2d28de60e3acc7239c/experiments/hh-rlhf")
SHA256 = "2abacfa98b7092e30d823bccf65a69d21f0ffa46ad50904f2b9ea5b0b92ba14e"


def make(sources, mirror):
    found = {(focus, split): {} for focus in ("helpful", "harmless") for split in ("train", "test")}
    for path in sources or [download(name, HERE / "download" / name, URL, mirror, sha)
                            for name, sha in FILES.items()]:
        focus = [f for f in ("helpful", "harmless") if f in "/".join(path.absolute().parts[-2:])]
        if len(focus) != 1:
            raise BadInput(f"{path}: its name must say which set it is, helpful or harmless; "
                           "rename it")
        for place, row in read_rows(path):
            query, split = first_turn(place, row), side(path.name)
            if query and not any(same(query) in found[f, split] for f in ("helpful", "harmless")):
                found[focus[0], split][same(query)] = {"query": query, "focus": focus[0]}
    for (focus, split), rows in found.items():
        print(f"{focus} {split}: {len(rows):,} different queries")
    train, test = (itertools.zip_longest(found["helpful", split].values(),
                                         found["harmless", split].values())
                   for split in ("train", "test"))
    # every other pair turned round:
    # sami.py takes every second query in turn, and each half should hold both kinds
    write_queries(HERE, *([row for i, pair in enumerate(pairs) for row in pair[::(-1) ** i] if row]
                          for pairs in (train, test)))


def official(mirror):
    folder = HERE / "official"
    text = constants(download("prompts.py", folder / "prompts.py", AUTHORS, mirror, SHA256))
    text = {name: value.replace("{question}", "Human: {query}") for name, value in text.items()}
    principles = [{"name": name.lower(), "positive": text[f"{name}_PRINCIPLE"],
                   "negative": text[f"NOT_{name}_PRINCIPLE"], "heldout": False}
                  for name in ("HELPFUL", "HARMLESS")]
    write_official(folder, HERE / "task.json", principles,
                   sampling_prompt=text["PROMPT_GENERATION_ITERATION_0"],
                   scoring_prompt=text["PROMPT_TRAINING"])


if __name__ == "__main__":
    main(__doc__, make, official)
