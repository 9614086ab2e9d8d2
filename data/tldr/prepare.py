"""Makes train.jsonl and test.jsonl: the Reddit posts of OpenAI's "summarize from feedback"
comparisons, each once.

    python data/tldr/prepare.py                 downloads 23 files; if it fails, run it again
    python data/tldr/prepare.py --source=batch3.json,valid.jsonl.gz
                                                takes local files of the same form
    python data/tldr/prepare.py --official      fetches the authors' prompts and principles;
                                                then --task=data/tldr/official/mistral (or opus)

Only the body of a post is used, not its title or subreddit, and the first copy of each post id is
kept, in the order of the Hugging Face data set openai/summarize_from_feedback. A row's "split" says
where it goes (train; valid1 and valid2 feed test.jsonl), or else the name of its file. Until this
has run, both hold a few invented posts.
"""
import json
from pathlib import Path

from sources import (BadInput, constants, download, main, read_rows, side, write_official,
                     write_queries)

HERE = Path(__file__).resolve().parent
URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
FILES = [*(f"batch{i}.json" for i in (3, 4, 5, *range(10, 21), 22, 6, 7, 8, 9)),
         "batch0_cnndm.json", "cnndm0.json", "cnndm2.json", "edit_b2_eval_test.json"]
AUTHORS = ("https://raw.githubusercontent.com/janphilippfranken/sami/"
           "120837110e9f4da3600f9cf418cf6ce13ce20e73/experiments/tldr")
SHA256 = {"prompts": "8cc101af2f7a1526907da48a1e90c6a1d3e8004a98efc35071d1cda055121b53",
          "mistral": "4ca321e47ef474174f4b74fe1d31e8a75ac70ebb712bb5724630e8fbc1603b08",
          "opus": "9bc71a8359e95e21cc0ee805d28ae20320c0c38ebffa65099627cd77404c39cc"}


def make(sources, mirror):
    posts, news = {"train": {}, "test": {}}, 0  # split -> id -> post
    for path in sources or [download(name, HERE / "download" / name, URL, mirror)
                            for name in FILES]:
        for place, row in read_rows(path):
            info = row.get("info", row) if isinstance(row, dict) else None
            if isinstance(info, dict) and info.get("article"):
                news += 1  # the cnndm files compare summaries of news
                continue
            if not isinstance(info, dict) or not isinstance(info.get("post"), str):
                raise BadInput(f'{place} has no "post" text, at the top or in "info"; '
                               "give files of this data set")
            if post := info["post"].strip():
                split = side(str(row.get("split", path.name)))
                posts[split].setdefault(info.get("id", post), {"query": post})
    print(f"{news:,} rows about news articles were passed over")
    write_queries(HERE, list(posts["train"].values()), list(posts["test"].values()))


def official(mirror):
    folder = HERE / "official"
    prompts = constants(download("prompts.py", folder / "prompts.py", AUTHORS, mirror,
                                 SHA256["prompts"]))
    prompts = {name: text.replace("{question}", "POST: {query}") for name, text in prompts.items()}
    for writer in ("mistral", "opus"):  # the model that wrote the principles
        # Both principles are negated in number 2 of their six constitutions,
        # so it holds all four sentences.
        sides = json.loads(download(f"constitutions_{writer}/2.json", folder / f"{writer}.json",
                                    AUTHORS, mirror, SHA256[writer]).read_text())
        names = [name.split()[1] for name in sides["identifiers"]["positive"]]  # "pos concise"
        lines = [[line.strip()[3:] for line in sides[key].split("\n")]
                 for key in ("positive", "negative")]
        write_official(folder / writer, HERE / "task.json",
                       [{"name": n, "positive": p, "negative": q, "heldout": False}
                        for n, p, q in zip(names, *lines)],
                       # the opening is our response_prefix, sampled and scored alike
                       sampling_prompt=prompts["PROMPT_GENERATION"].removesuffix(" The post"),
                       scoring_prompt=prompts["PROMPT_TRAINING"])


if __name__ == "__main__":
    main(__doc__, make, official)
