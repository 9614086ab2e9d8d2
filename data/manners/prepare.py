"""Makes train.jsonl and test.jsonl: what people first ask in the helpful-base dialogues of HH-RLHF
(MIT license), where that is one line of 15 to 90 characters: the first 1,000 of its training set,
the first 250 of its test set. harmless.jsonl: 100 such lines of harmless-base's test set, questions
of another kind, to see what training does to what it never saw.

    python data/manners/prepare.py                 downloads three files, about 18 MB;
                                                   if it fails, run it again
    python data/manners/prepare.py --source=helpful-train.jsonl.gz,helpful-test.jsonl.gz

The name of a local file (.jsonl, .jsonl.gz, or a .json list of first turns), or of its folder, says
helpful or harmless; a file with test or valid in its name feeds test.jsonl.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tldr"))
from sources import BadInput, download, first_turn, main, read_rows, same, side, write_queries

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
FILES = {
    "helpful-base/train.jsonl.gz":
        "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test.jsonl.gz":
        "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "harmless-base/test.jsonl.gz":
        "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
}
COUNT = {"train": 1000, "test": 250, "harmless": 100}


def make(sources, mirror):
    found = {kind: {} for kind in COUNT}  # kind: {what makes a query the same: query}
    for path in sources or [download(name, HERE / "download" / name, URL, mirror, sha)
                            for name, sha in FILES.items()]:
        name = "/".join(path.absolute().parts[-2:])
        if ("helpful" in name) == ("harmless" in name):
            raise BadInput(f"{path}: its name must say which set it is, helpful or harmless; "
                           "rename it")
        kind = side(path.name) if "helpful" in name else "harmless"
        for place, row in read_rows(path):
            query = first_turn(place, row)
            if 15 <= len(query) <= 90 and "\n" not in query:
                found[kind].setdefault(same(query), query)
    test = list(found["test"].items())[:COUNT["test"]]
    for kind in ("train", "harmless"):
        for key, _ in test:
            found[kind].pop(key, None)
    rows = {kind: [{"query": query} for query in list(queries.values())[:COUNT[kind]]]
            for kind, queries in found.items()}
    write_queries(HERE, rows["train"], rows["test"])
    if rows["harmless"]:
        text = "".join(json.dumps(row) + "\n" for row in rows["harmless"])
        (HERE / "harmless.jsonl").write_text(text)


if __name__ == "__main__":
    main(__doc__, make)
