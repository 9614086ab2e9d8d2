"""Fetches the authors' twenty principles and prompts. The posts are those of data/tldr, whose
prepare.py makes them.

    python data/tldr/prepare.py                       the posts, for both tasks
    python data/principles/prepare.py --official      the authors' texts;
                                                      then --task=data/principles/official
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tldr"))
from sources import BadInput, constants, download, main, write_official

# The authors' released repository has two principles only;
# these are in the repository they developed it in.
AUTHORS = ("https://raw.githubusercontent.com/janphilippfranken/typo/"
           "41854deef934c3c8a2d0de2d28de60e3acc7239c/experiments/tldr")
FILES = {"prompts.py": "1c68f3f554439c122f55f595d185c75a344dee1f3b27509842cd18772486af6d",
         "constitutions_opus_diverse/constitutions.json":
         "7c149051c291568d1b2c116f4a9256cd5a5f6ed247de8291b003d6834b033d2e"}


def make(sources, mirror):
    raise BadInput("this task takes its posts from data/tldr; run data/tldr/prepare.py, "
                   "or this with --official")


def official(mirror):
    folder = HERE / "official"
    prompts, definitions = (download(name, folder / Path(name).name, AUTHORS, mirror, sha)
                            for name, sha in FILES.items())
    principles = [{"name": name, "positive": p["definition"], "negative": p["antithesis"],
                   "heldout": i >= 15}  # 15 learned, 5 held out
                  for i, (name, p) in enumerate(json.loads(definitions.read_text()).items())]
    text = {name: value.replace("{question}", "POST: {query}")
            for name, value in constants(prompts).items()}
    for name, sampling in (("task.json", "PROMPT_TRAINING"),
                           ("task-cot.json", "PROMPT_GENERATION_ITERATION_0_COT")):
        write_official(folder, HERE / name, principles,
                       sampling_prompt=text[sampling], scoring_prompt=text["PROMPT_TRAINING"])


if __name__ == "__main__":
    main(__doc__, make, official)
