"""
Responses of any model or checkpoint to the queries of a task; or principles for a new task.

    python generate.py --model=out/iteration-3                  answers the test queries of data/toy
    python generate.py --model=some/chat-model --chat           any model, here in its chat format
    python generate.py --model=gpt2 --task=data/tldr --show     what the model would read
    python generate.py --model=... --write_principles="summarise posts: concise, comprehensive"

Lines are Examples, as iteration 1 of sami.py makes them of these queries. A stopped run goes on.
"""
import dataclasses, json, os, re, zlib
from pathlib import Path

import numpy as np

import sami
from sami import RunFailed, flag, need, telling


@dataclasses.dataclass
class Config:
    model: str = flag("data/toy/base", "Hugging Face folder or hub name")
    task: str = flag("data/toy", "folder with prompts, principles and queries")
    queries: str = flag("", 'file of {"query": ...} lines; default: the test queries of the task')
    n: int = flag(1, "constitutions per query, one response each", low=1)
    constitution: str = flag("", "this text for every query; default: drawn as in training")
    chat: bool = flag(False, "the prompt of a plain task is the user's message to a chat model")
    temperature: float = flag(0.0, "0 = greedy", low=0)
    top_p: float = flag(1.0, "sample from the fewest tokens with this share", low=1e-6, high=1)
    max_new_tokens: int = flag(32, "longest response", low=1)
    seed: int = flag(1, "draws and noise are functions of it and of the query's number", low=0)
    limit: int = flag(0, "answer only the first so many queries; 0 = all", low=0)
    out: str = flag("responses.jsonl", "where the lines go; <out>.flags.json tells how they arose")
    show: bool = flag(False, "only print prompts, draws and filters; loads no weights")
    write_principles: str = flag("", '"what to do: name, name": principles, to --out as .json')
    sample_batch: int = flag(64, "responses sampled side by side; less takes less memory", low=1)
    device: str = flag("auto", "where it runs", "auto", "cpu", "cuda", "mps")
    dtype: str = flag("auto", "of computation: bfloat16 on GPUs", "auto", "float32", "bfloat16")


FREE = "limit out show write_principles sample_batch device".split()  # not what lines depend on
ORDER = "Write the two lines that are missing at the end, + and its opposite -, and no more.\n\n"
EXAMPLE = """Task: answer questions about the weather
Name: brief
+ The answer should be one short sentence with nothing that was not asked for.
- The answer should be long, with many details that nobody asked for.
Name: cautious
+ The answer should say how sure it is and what could turn out differently.
- The answer should sound certain and leave out every doubt.
Task: {query}
Name: {constitution}
+"""


class Asked(sami.Task):
    """A task whose plain prompts may go to a chat model, and whose constitution may be given."""

    def fill(self, template, x, c):
        prompt = super().fill(template, x, self.given or c)
        return [dict(role="user", content=prompt)] if self.for_chat and not self.chat else prompt


def write(path, mode, text):
    full = telling(f"{path} cannot be written: make room, then start this again", RunFailed)
    with full, open(path, mode) as f:
        f.write(text)


def parse_principle(text):
    """What follows the last + of EXAMPLE -> (positive, negative), or None in any other form."""
    side = r"([^\s{][^\n{]{8,298}[^\s{])"  # a brace could be filled in as a template
    found = re.match(rf"\s*\+? *{side} *\n *- *{side} *(\n|$)", text)
    return found.groups()[:2] if found and found[1] != found[2] else None


def write_principles(tokenizer, device, cfg, out, tries=8):
    """A principle and its antithesis for each name of --write_principles, as principles.json."""
    what, _, names = cfg.write_principles.partition(":")
    names = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    need(what.strip() and names, '--write_principles needs the form "what to do: name, name"')
    need(not out.exists(), f"{out} is there already; name another --out, or remove it")
    task = Asked.__new__(Asked)  # of no folder: the query is what to do, the constitution a name
    vars(task).update(templates=[ORDER * cfg.chat + EXAMPLE], stop=["\nName:"], response_prefix="",
                      answer_after="", chat=False, for_chat=cfg.chat, given="")
    sami.encode(tokenizer, task.sampling_prompt(what, ""))  # raises before weights load
    model, rows = sami.load_model(cfg.model, device, cfg), []
    cfg.max_new_tokens = 120
    for k, name in enumerate(names):
        for attempt in range(tries):  # greedily, all would be the same
            [(_, _, text, _)] = sami.respond(model, tokenizer, task, [(what.strip(), name)], cfg,
                                             [(cfg.seed, attempt, k)], cfg.temperature or 0.7)
            if pair := parse_principle(text):
                break
        need(pair, f"{cfg.model} wrote no principle of the right form for {name} in {tries} tries; "
             "use a larger model, or write it by hand", RunFailed)
        rows.append(dict(name=name, positive=pair[0], negative=pair[1], heldout=False))
    write(out, "x", json.dumps(rows, indent=1) + "\n")
    print(f"{out.read_text()}written to {out}: read and edit every line before you train on it")


def show(task, tokenizer, cfg):
    """Print what a run with these flags reads of a task, and what it drops."""
    drawn = [(q["query"], task.draw(np.random.default_rng((cfg.seed, 1, i, sami.DRAW)), cfg.n,
                                    q.get("focus"))) for i, q in enumerate(task.train[:500])]
    for name, fill, prefix in (("sampling", task.sampling_prompt, task.response_prefix),
                               ("scoring", task.prompt, "")):
        ids = [sum(sami.encode(tokenizer, fill(x, c), prefix), []) for x, cs in drawn for c in cs]
        sizes = [len(prompt) for prompt in ids]
        print(f"--- a {name} prompt, as the model reads it ({len(drawn)} training queries: mean "
              f"{np.mean(sizes):.0f}, at most {max(sizes)} tokens)\n{tokenizer.decode(ids[0])}")
    for j, c in enumerate(drawn[0][1], 1):
        print(f"--- c_{j}: {dict(zip(c.names, c.sides))}\n{task.given or c}")
    keys = "answer_after", "stop", "drop_if_contains", "first_must_end_with"
    print("--- cut and dropped, besides empty or equal ones:", {k: getattr(task, k) for k in keys})


def answered(out, task, cfg):
    """Make --out this run's own, half a last line cut off -> how many queries have an answer."""
    path, flags = Path(f"{out}.flags.json"), {k: v for k, v in vars(cfg).items() if k not in FREE}
    made = sorted((p.name, p.stat().st_mtime_ns) for p in Path(cfg.model).glob("*.safetensors"))
    flags["files"] = zlib.crc32(repr((vars(task), made)).encode())
    if not out.exists():
        write(path, "w", json.dumps(flags, indent=1))
        return 0
    with telling(f"{out} is nothing that generate.py can go on with; name another --out"):
        before, data = dict(json.loads(path.read_bytes())), out.read_bytes()
        for i, line in enumerate(data.split(b"\n")):  # the last is empty or half of one
            start = b'{"number": %d,' % i
            assert start.startswith(line[:len(start)]), f"look at line {i + 1}"
        other = [f"{k}={before.get(k)}" for k in flags if before.get(k) != flags[k]]
        need(not other, f"{out} was begun with other flags, or other files of the task: "
             f"{', '.join(other)}; go on with these, or name another --out")
        os.truncate(out, data.rfind(b"\n") + 1)
        return data.count(b"\n")


def main(argv):
    cfg = sami.parse(Config, argv)
    out = Path(cfg.out)
    need(os.environ.get("WORLD_SIZE", "1") == "1", "start generate.py with python, not torchrun")
    need(out.parent.is_dir() and not out.is_dir(), f"--out={out}: name a file in a folder")
    need(cfg.n == 1 or not cfg.constitution, "--constitution is a single text: leave out --n")
    device, (config, tokenizer) = sami.pick_device(cfg), sami.load_tokenizer(cfg.model)
    if cfg.write_principles:
        return write_principles(tokenizer, device, cfg, out.with_suffix(".json"))
    task = Asked(cfg.task)
    task.for_chat, task.given = cfg.chat, cfg.constitution
    task.test = task.read_queries(Path(cfg.queries).resolve()) if cfg.queries else task.test
    task.train = task.train if cfg.show else []  # nobody asks these: they need not fit
    task.check_lengths(config, tokenizer, cfg)
    task.draw(np.random.default_rng(0), cfg.n)  # raises where there are fewer
    if cfg.show:
        return show(task, tokenizer, cfg)
    done, todo = answered(out, task, cfg), list(enumerate(task.test))[:cfg.limit or None]
    model = sami.load_model(cfg.model, device, cfg) if done < len(todo) else None
    while done < len(todo):
        print(f"{done} of {len(todo)} queries are answered in {out}", flush=True)
        now = todo[done:done // 256 * 256 + 256]  # what a stop loses at most
        for e in sami.sample_examples(model, tokenizer, task, now, cfg, 1, cfg.temperature):
            row = {k: v for k, v in vars(e).items() if k != "base"}
            row.update(dict(constitutions=[task.given], sides=[{}]) if task.given else {})
            write(out, "a", json.dumps(row) + "\n")
        done += len(now)
    for e in map(json.loads, out.read_text().splitlines()[:2]):
        print(f"\n{e['constitutions'][0]}\nquery: {e['query']}\nresponse: {e['responses'][0]}")
    print(f"\nthe responses are in {out}; remove it to have them made anew")


if __name__ == "__main__":
    sami.run(main)
