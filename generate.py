"""
Responses of any model or checkpoint to the queries of a task, as JSON lines; or principles for a new task.

    python generate.py --model=out/iteration-3                          the test queries of data/toy
    python generate.py --model=gpt2 --task=data/tldr --temperature=0.7  any causal LM of the hub
    python generate.py --model=some/instruct-model --chat               prompts as messages in the model's chat format
    python generate.py --task=data/tldr --model=gpt2 --show             what the model would read
    python generate.py --model=... --write_principles="summarise Reddit posts: concise, comprehensive"

Each line of --out holds query, constitution, sides, response, tokens, and how it was made. A run that was stopped goes
on where it was: queries that already have a line are skipped.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sami
from sami import flag, need


@dataclass
class Config:
    model: str = flag("data/toy/base", "Hugging Face folder or hub name")
    task: str = flag("data/toy", "folder with the prompts, principles and queries")
    show: bool = flag(False, "only show prompts, draws and filters of the task; loads no weights")
    n: int = flag(4, "with --show: constitutions per query", low=2)
    queries: str = flag("", 'file of {"query": ...} lines; default: the task\'s test queries')
    constitution: str = flag("", "this text for every query; default: drawn from the principles")
    heldout: bool = flag(False, "draw from the principles that training never sees")
    chat: bool = flag(False, "for instruction models: a plain task's prompt is the user's message")
    out: str = flag("responses.jsonl", "where the lines go")
    limit: int = flag(0, "only the first so many queries; 0 = all", low=0)
    temperature: float = flag(0.0, "0 = greedy", low=0)
    top_p: float = flag(1.0, "sample from the fewest tokens with this probability", low=1e-6,
                        high=1)
    max_new_tokens: int = flag(32, "longest response", low=1)
    sample_batch: int = flag(64, "responses sampled side by side; less takes less memory", low=1)
    seed: int = flag(1, "draws and noise are functions of it and of the query's place in the file",
                     low=0)
    device: str = flag("auto", "where it runs", "auto", "cpu", "cuda", "mps")
    dtype: str = flag("auto", "of computation: bfloat16 on GPUs", "auto", "float32", "bfloat16")
    write_principles: str = flag("", '"what to do: name, name, ...": write a principle and its '
                                 "antithesis for each name")


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

    def fill(self, template, x, c):
        prompt = super().fill(template, x, c)
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
                            eos_ids=sami.end_ids(model, tokenizer), batch=cfg.sample_batch,
                            seed=[(cfg.seed, attempt, names.index(name)) for name in missing])
        for name, ids in zip(missing, texts):
            if pair := parse_principle(tokenizer.decode(ids, skip_special_tokens=True)):
                found[name] = dict(name=name, positive=pair[0], negative=pair[1], heldout=False)
        if len(found) == len(names):
            return [found[name] for name in names]
    missing = ", ".join(name for name in names if name not in found)
    raise sami.RunFailed(f"{cfg.model} wrote no principle of the right form for {missing} in {tries} tries; use a "
                         "larger model, or write them by hand")


def show(task, config, tokenizer, cfg):
    """Print what a run of sami.py with these flags would read of a task, and what it would drop."""
    ids = lambda fill, q, c, prefix: sum(sami.encode(tokenizer, fill(q["query"], c), prefix), [])
    some = list(enumerate(task.train))[::len(task.train) // 500 + 1]  # enough for a mean
    drawn = [task.draw(np.random.default_rng((cfg.seed, 1, i, sami.DRAW)), cfg.n, q.get("focus"))
             for i, q in some]
    for kind, fill, prefix in (("sampling", task.sampling_prompt, task.response_prefix),
                               ("scoring", task.prompt, "")):
        prompts = [ids(fill, q, cs[0], prefix) for (_, q), cs in zip(some, drawn)]
        mean = sum(map(len, prompts)) / len(some)
        print(f"--- a {kind} prompt, as the model reads it (mean of {len(some)} training queries: "
              f"{mean:.0f} tokens)\n{tokenizer.decode(prompts[0])}")
    print(f"--- the {cfg.n} constitutions of this query")
    for j, c in enumerate(drawn[0], 1):
        sides = ", ".join("not " * (not side) + name for name, side in zip(c.names, c.sides))
        print(f"c_{j}: {sides}\n{c}")
    words = dict(answer_after="a response starts behind", stop="a response ends before any of",
                 drop_if_contains="a query is dropped if a response contains any of",
                 first_must_end_with="a query is dropped unless its first response ends with")
    print("--- a query is dropped if a response is empty or two are the same",
          *[f"{text} {getattr(task, key)!r}" for key, text in words.items() if getattr(task, key)],
          sep="\n")
    # as Task.check_lengths has it: every query with the longest wordings
    size = lambda text: len(tokenizer(text).input_ids)
    texts = [max(p["positive"] + p["negative"], key=size) for p in task.principles + task.heldout]
    texts = sorted(texts, key=size)[-task.principles_per_constitution:]
    c = sami.Constitution((), (), texts, task.numbered)
    longest = max(len(ids(fill, q, c, task.response_prefix)) for q in task.train + task.test
                  for fill in (task.prompt, task.sampling_prompt))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or "any length"
    print(f"--- the longest prompt has {longest} tokens; it and --max_new_tokens="
          f"{cfg.max_new_tokens} fit the model's context of {limit}")


def main(argv):
    cfg = sami.parse(Config, argv)
    need(sami.WORLD == 1, "generate.py runs in one process: start it with python")
    need(Path(cfg.out).parent.is_dir() and not Path(cfg.out).is_dir(), f"--out={cfg.out}: name a file in a folder")
    device = sami.pick_device(cfg)
    task = None if cfg.write_principles else (ChatTask if cfg.chat else sami.Task)(cfg.task)
    config, tokenizer = sami.load_tokenizer(cfg.model)
    out = Path(cfg.out)
    if cfg.write_principles:
        sami.encode(tokenizer, example("", "", cfg.chat))  # raises before the weights load
        model = sami.load_model(cfg.model, device, cfg)
        with sami.compute(model, cfg):
            entries = write_principles(model, tokenizer, cfg)
        text = "[\n" + ",\n".join(" " + json.dumps(e) for e in entries) + "\n]\n"
        out.with_suffix(".json").write_text(text, encoding="utf-8")
        print(text + f"written to {out.with_suffix('.json')}: read and edit every line before you train on it")
        return
    queries = task.read_queries(Path(cfg.queries).resolve()) if cfg.queries else task.test
    queries = queries[:cfg.limit or None]
    task.check_lengths(config, tokenizer, cfg)
    if cfg.show:
        return show(task, config, tokenizer, cfg)
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
    model = sami.load_model(cfg.model, device, cfg) if todo else None
    for chunk in (todo[k:k + 1024] for k in range(0, len(todo), 1024)):  # what a stop loses at most
        drawn = [task.draw(np.random.default_rng((cfg.seed, i)), 1, heldout=cfg.heldout)[0] for i, _ in chunk]
        pairs = [(q["query"], cfg.constitution or c) for (_, q), c in zip(chunk, drawn)]
        keys = [(cfg.seed, i, 0) for i, _ in chunk]
        found = sami.respond(model, tokenizer, task, pairs, cfg, keys, cfg.temperature)
        with open(out, "a", encoding="utf-8") as f:
            for (x, c), drawn_c, (_, ids, text, _) in zip(pairs, drawn, found):
                sides = {} if cfg.constitution else dict(zip(drawn_c.names, drawn_c.sides))
                f.write(json.dumps(dict(query=x, constitution=str(c), sides=sides, response=text,
                                        tokens=len(ids), **made_by)) + "\n")
    for e in map(json.loads, out.read_bytes().splitlines()[:2]):
        print(f"\n{e['constitution']}\nquery: {sami.flat(e['query'])}\nresponse: {e['response']}")
    print(f"\n{len(queries)} responses in {out}")


if __name__ == "__main__":
    sami.run(main)
