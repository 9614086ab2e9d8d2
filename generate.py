"""
Responses of any model or checkpoint to the queries of a task, as JSON lines; or principles for a new task.

    python generate.py --model=out/iteration-3                          the test queries of data/toy
    python generate.py --model=gpt2 --task=data/tldr --temperature=0.7  any causal LM of the hub
    python generate.py --model=some/instruct-model --chat               prompts as messages in the model's chat format
    python generate.py --model=... --write_principles="summarise Reddit posts: concise, comprehensive"

Each line of --out holds query, constitution, sides, response, tokens, and how it was made. A run that was stopped goes
on where it was: queries that already have a line are skipped.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import sami
from sami import need


@dataclass
class Config:
    model: str = "data/toy/base"  # Hugging Face folder or hub name
    task: str = "data/toy"  # folder with the prompts, principles and queries
    queries: str = ""  # file of {"query": ...} lines; default: the task's test queries
    constitution: str = ""  # this text for every query; default: drawn from the task's principles
    heldout: bool = False  # draw from the principles that training never sees
    chat: bool = False  # for instruction models: a plain task's whole prompt is the user's message
    out: str = "responses.jsonl"  # where the lines go
    limit: int = 0  # only the first so many queries; 0 = all
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    max_new_tokens: int = 32  # longest response
    sample_gb: float = 0.0  # memory for responses sampled side by side; 0 = 80 % of a GPU's free memory, 4 GB elsewhere
    seed: int = 1  # draws and noise are functions of it and of the query's place in the file
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # of computation: auto | float32 | bfloat16
    write_principles: str = ""  # "what to do: name, name, ...": write a principle and its antithesis for each name
    score_eos = False  # a constant here, for sami.answer: responses are text


EXAMPLE = """Each principle has a name, a line + that asks for it and a line - that asks for the opposite.

Task: answer questions about the weather
Name: brief
+ The answer should be one short sentence with nothing that was not asked for.
- The answer should be long, with many details that nobody asked for.
Name: cautious
+ The answer should say how sure it is and what could turn out differently.
- The answer should sound certain and leave out every doubt.

Task: {task}
Name: {name}
+"""


def parse_principle(text):
    """What a model wrote behind the example's last "+", which it may repeat -> (positive, negative), or None unless it
    has exactly the form of one line and one more that begins with "-". It is only ever read as text."""
    lines = [line.strip() for line in ("+" + text.strip().removeprefix("+")).split("\n")[:2]]
    if len(lines) < 2 or lines[1][:1] != "-":
        return None
    positive, negative = (line[1:].strip() for line in lines)
    fine = all(10 <= len(t) <= 300 and "{" not in t for t in (positive, negative)) and positive != negative
    return (positive, negative) if fine else None


class ChatTask(sami.Task):
    """A task for an instruction model: a plain prompt becomes a list of one message, the user's."""

    def fill(self, key, x, c):
        prompt = super().fill(key, x, c)
        return prompt if self.chat else [dict(role="user", content=prompt)]


def example(what, name, chat):
    """The prompt for one principle: a text to go on with, or the messages that ask a chat model to go on with it."""
    text = EXAMPLE.replace("{task}", what).replace("{name}", name)
    order = "Write the two lines, + and -, that are missing at the end, and nothing else."
    return [dict(role="user", content=f"{order}\n\n{text}")] if chat else text


def write_principles(model, tokenizer, cfg, tries=8):
    """Principle and antithesis for each name in --write_principles, by the model -> list as in principles.json."""
    what, _, names = cfg.write_principles.partition(":")
    names = [name.strip() for name in names.split(",") if name.strip()]
    need(what.strip() and names, "--write_principles needs the form \"what to do: name, name, ...\"")
    found = {}
    for attempt in range(tries):  # the noise of a try depends on (seed, try, name) alone
        missing = [name for name in names if name not in found]
        prompts = [sami.encode(tokenizer, example(what.strip(), name, cfg.chat))[0] for name in missing]
        texts = sami.sample(model, prompts, max_new_tokens=120, temperature=cfg.temperature or 0.7, top_p=cfg.top_p,
                            eos_ids=sami.end_ids(model, tokenizer), memory=cfg.sample_gb * 1e9,
                            seed=[(cfg.seed, attempt, names.index(name)) for name in missing])
        for name, ids in zip(missing, texts):
            if pair := parse_principle(tokenizer.decode(ids, skip_special_tokens=True)):
                found[name] = dict(name=name, positive=pair[0], negative=pair[1], heldout=False)
        if len(found) == len(names):
            return [found[name] for name in names]
    missing = ", ".join(name for name in names if name not in found)
    raise sami.RunFailed(f"{cfg.model} wrote no principle of the right form for {missing} in {tries} tries; use a "
                         "larger model, or write them by hand")


def main(argv):
    cfg = sami.parse(Config, argv)
    need(sami.WORLD == 1, "generate.py runs in one process: start it with python")
    for name, low in dict(limit=0, temperature=0, top_p=1e-6, max_new_tokens=1, sample_gb=0, seed=0).items():
        need(getattr(cfg, name) >= low, f"--{name}={getattr(cfg, name)} must be at least {low}")
    need(Path(cfg.out).parent.is_dir() and not Path(cfg.out).is_dir(), f"--out={cfg.out}: name a file in a folder")
    device, dtype = sami.pick_device(cfg)
    task = None if cfg.write_principles else (ChatTask if cfg.chat else sami.Task)(cfg.task)
    config, tokenizer = sami.load_tokenizer(cfg.model)
    out = Path(cfg.out)
    if cfg.write_principles:
        sami.encode(tokenizer, example("", "", cfg.chat))  # raises before the weights load
        with sami.compute(device, dtype):
            entries = write_principles(sami.load_model(cfg.model, device), tokenizer, cfg)
        text = "[\n" + ",\n".join(" " + json.dumps(e) for e in entries) + "\n]\n"
        sami.write(out.with_suffix(".json"), text)
        print(text + f"written to {out.with_suffix('.json')}: read and edit every line before you train on it")
        return
    queries = (task.queries(Path(cfg.queries).resolve()) if cfg.queries else task.test)[:cfg.limit or None]
    sami.check_lengths(task, config, tokenizer, cfg)
    made_by = {k: getattr(cfg, k) for k in ("model", "temperature", "top_p", "heldout", "max_new_tokens", "seed")}
    made_by.update(given=cfg.constitution, chat=cfg.chat or task.chat)
    try:
        there = [json.loads(line) for line in out.read_bytes().splitlines()] if out.exists() else []
        done = {sami.flat(e["query"]) for e in there if all(e[k] == v for k, v in made_by.items())}
    except (ValueError, KeyError, TypeError):
        raise sami.BadInput(f"{out} holds something else than lines of responses; name another --out, or remove it")
    need(len(done) == len(there), f"{out} holds responses of another model or with other flags; name another --out")
    todo = [(i, q) for i, q in enumerate(queries) if sami.flat(q["query"]) not in done]
    print(f"{len(queries)} queries, {len(queries) - len(todo)} already in {out}")
    model = sami.load_model(cfg.model, device) if todo else None
    for chunk in (todo[k:k + 1024] for k in range(0, len(todo), 1024)):  # what a stop loses at most
        drawn = [task.draw(sami.rng(cfg.seed, i), 1, heldout=cfg.heldout)[0] for i, _ in chunk]
        pairs = [(q["query"], cfg.constitution or c) for (_, q), c in zip(chunk, drawn)]
        with sami.compute(device, dtype):
            answers = sami.answer(model, tokenizer, task, pairs, cfg, [(cfg.seed, i, 0) for i, _ in chunk],
                                  cfg.temperature, f"{len(todo)} responses")
        with open(out, "a", encoding="utf-8") as f:
            for (x, c), drawn_c, a in zip(pairs, drawn, answers):
                sides = {} if cfg.constitution else dict(zip(drawn_c.names, drawn_c.sides))
                f.write(json.dumps(dict(query=x, constitution=str(c), sides=sides, response=a["text"],
                                        tokens=len(a["response"]), **made_by)) + "\n")
    for e in map(json.loads, out.read_bytes().splitlines()[:2]):
        print(f"\n{e['constitution']}\nquery: {sami.flat(e['query'])}\nresponse: {e['response']}")
    print(f"\n{len(queries)} responses in {out}")


if __name__ == "__main__":
    sami.run(main)
