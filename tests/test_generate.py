"""A response is made once, and is a sample that sami.py trains on, whichever engine made it."""
import json, re, resource, subprocess, sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate, sami, tiny

ROOT = Path(sami.__file__).parent
TOY = [f"--task={ROOT}/data/toy", f"--model={ROOT}/data/toy/base", "--device=cpu"]
KEYS = [f.name for f in fields(sami.Example) if f.name != "base"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    """Answer the six test queries of a tiny task, or others -> the lines in path/r.jsonl."""
    flags = tiny.folder(tmp_path)

    def run(*more, out="r.jsonl"):
        generate.main([*flags[:2], "--device=cpu", "--max_new_tokens=8", "--temperature=0.7",
                       f"--out={tmp_path / out}", *more])
        return lines(tmp_path / out)

    run.path, run.flags = tmp_path, flags
    return run


def without_weights(monkeypatch):
    monkeypatch.setattr(sami, "load_model", lambda *_: pytest.fail("nothing is to be sampled"))


# -------------------------------------------------------------------------------------- going on


def test_a_line_is_an_example(run):
    rows = run("--n=2")
    assert [list(row) for row in rows] == [KEYS] * 6
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["query"] for row in rows] == [f"test {letter}" for letter in "abcdef"]
    task = sami.load_task(run.path / "task")
    for row in rows:  # seed 1, iteration 1
        cs = task.draw(np.random.default_rng((1, 1, row["number"], sami.DRAW)), 2)
        assert row["constitutions"] == [str(c) for c in cs]
        assert row["sides"] == [dict(zip(c.names, c.sides)) for c in cs]
        assert len(row["responses"]) == len(row["ids"]) == len(row["prompts"]) == 2


def test_a_stopped_run_goes_on(tmp_path, capsys):
    out, whole = tmp_path / "responses.jsonl", tmp_path / "whole.jsonl"
    generate.main([*TOY, f"--out={out}", "--limit=3"])
    first = out.read_bytes()
    generate.main([*TOY, f"--out={out}", "--limit=5"])
    assert out.read_bytes().startswith(first) and len(lines(out)) == 5
    generate.main([*TOY, f"--out={whole}", "--limit=5"])
    assert out.read_bytes() == whole.read_bytes(), "as if it had never stopped"
    assert f"3 of 5 queries are answered in {out}" in capsys.readouterr().out


def test_what_is_answered_is_not_answered_again(run, monkeypatch, capsys):
    rows = run()
    without_weights(monkeypatch)
    capsys.readouterr()
    assert run("--sample_batch=1", "--limit=3") == rows, "not what responses depend on"
    printed = capsys.readouterr().out
    for row in rows[:2]:
        assert f"{row['constitutions'][0]}\nquery: {row['query']}\nresponse: " in printed
    assert f"in {run.path}/r.jsonl" in printed.splitlines()[-1]


@pytest.mark.parametrize("end", ["in a line", "in the first line", "before the line's end",
                                 "between lines", "before the first"])
def test_half_a_last_line_is_cut_off(run, end):
    run()
    out = run.path / "r.jsonl"
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    size = {"in a line": len(whole) - 40, "in the first line": 7, "before the line's end":
            len(whole) - 1, "between lines": first, "before the first": 0}[end]
    out.write_bytes(whole[:size])
    run()
    assert out.read_bytes() == whole


def test_a_full_disk(run):
    run(out="whole.jsonl")
    whole, out = (run.path / "whole.jsonl").read_bytes(), run.path / "r.jsonl"
    size = len(whole) // 2
    flags = [*run.flags[:2], "--device=cpu", "--max_new_tokens=8", "--temperature=0.7"]
    told = subprocess.run(
        [sys.executable, ROOT / "generate.py", *flags, f"--out={out}"], text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert told.returncode == 1 and told.stderr.count("\n") == 1, told.stderr
    for word in ("error: ", str(out), "make room", "start this again", "File too large"):
        assert word in told.stderr
    assert out.read_bytes() == whole[:size] and whole[size - 1:size] != b"\n", "half a last line"
    run()
    assert out.read_bytes() == whole


def test_equal_queries_are_told_apart_by_their_number(run):
    file = run.path / "mine.jsonl"
    file.write_text('{"query": "twice\\u2028"}\n' * 3)
    run(f"--queries={file}", "--limit=2")
    rows = run(f"--queries={file}")
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert {row["query"] for row in rows} == {"twice\u2028"}
    assert len({row["constitutions"][0] for row in rows}) > 1, "each has its own draw"


def test_more_queries_than_are_sampled_at_once(run):
    file = run.path / "mine.jsonl"
    file.write_text('{"query": "so"}\n' * 260)
    flags = [f"--queries={file}", "--max_new_tokens=1"]
    whole = run(*flags, out="whole.jsonl")
    assert [row["number"] for row in whole] == list(range(260))
    run(*flags, "--limit=100")
    assert run(*flags) == whole


# ----------------------------------------------------------------------- files of someone else


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"query": "hi", "response": "ho"}\n',
                                  '{"number": 7, "query": "hi"}\n', "", "[]\n"])
@pytest.mark.parametrize("flags_beside", [False, True])
def test_a_file_that_holds_something_else_is_left_alone(run, monkeypatch, text, flags_beside):
    out = run.path / "r.jsonl"
    if flags_beside and text:  # those of a file that was there before
        run()
    without_weights(monkeypatch)
    out.write_text(text)
    before = sorted(run.path.iterdir())
    with pytest.raises(sami.BadInput, match="r.jsonl .* name another --out"):
        run()
    assert out.read_text() == text and sorted(run.path.iterdir()) == before


@pytest.mark.parametrize("flag, was", [
    ("--temperature=0.5", "temperature=0.7"), ("--seed=2", "seed=1"), ("--n=2", "n=1"),
    ("--top_p=0.9", "top_p=1.0"), ("--max_new_tokens=4", "max_new_tokens=8"),
    ("--constitution=be", "constitution="), ("--dtype=float32", "dtype=auto"),
    ("--queries=task/test.jsonl", "queries=")])
def test_a_file_with_other_flags_is_left_alone(run, monkeypatch, flag, was):
    run("--limit=2")
    without_weights(monkeypatch)
    monkeypatch.chdir(run.path)
    before = {p: p.read_bytes() for p in run.path.iterdir() if p.is_file()}
    with pytest.raises(sami.BadInput, match=f"r.jsonl .*other flags.*{was}.*name another --out"):
        run(flag)
    assert {p: p.read_bytes() for p in run.path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("name", ["test.jsonl", "principles.json", "task.json"])
def test_a_file_of_responses_under_another_task_is_left_alone(run, monkeypatch, name):
    run("--limit=2")
    without_weights(monkeypatch)
    file = run.path / "task" / name
    text = file.read_text()
    changed = text.replace("test c", "test z").replace("do s", "do so").replace("Q:", "Query:")
    assert changed != text
    file.write_text(changed)
    with pytest.raises(sami.BadInput, match="r.jsonl .*other files of the task"):
        run()
    file.write_text(text)
    with pytest.raises(pytest.fail.Exception):  # goes on
        run()


def test_flags_without_lines_are_nothing_to_lose(run):
    """As a disk that was full at once leaves them, or a user who removed the responses."""
    run("--seed=2", "--limit=1")
    (run.path / "r.jsonl").unlink()
    (run.path / "r.jsonl.flags.json").write_text('{"seed": ')
    assert len(run()) == 6


# ---------------------------------------------------------------------------- flags, and wrong ones


def test_a_constitution_of_ones_own(run):
    rows = run("--constitution=keep it {query}", "--limit=2")
    t = tiny.tokenizer()
    for row in rows:
        assert row["constitutions"] == ["keep it {query}"] and row["sides"] == [{}]
        assert t.decode(row["prompts"][0]) == f"keep it {{query}}\nQ: {row['query']}\nA:"


@pytest.mark.parametrize("flag, words", [
    ("--n=0", "--n=0 .*between 1"), ("--n=5", "at most 4 .*lower --n"),
    ("--heldout", "--heldout.*--help"), ("--out=no/r.jsonl", "--out=no/r.jsonl.*file in a folder"),
    ("--out=.", "file in a folder"), ("--queries=none.jsonl", "none.jsonl cannot be read"),
    ("--queries=task/task.json", "task.json line 1 must"), ("--limit=-1", "--limit=-1"),
    (f"--constitution={'word ' * 60}", "test.jsonl line 1: .*context of 256"),
    ("--max_new_tokens=250", "context of 256"), ("--task=none", "none/task.json")])
def test_bad_input_is_met_before_weights_load(run, monkeypatch, flag, words):
    without_weights(monkeypatch)
    monkeypatch.chdir(run.path)
    before = sorted(run.path.iterdir())
    with pytest.raises(sami.BadInput, match=words):
        run(flag)
    assert sorted(run.path.iterdir()) == before


def test_what_is_asked_has_to_fit_and_nothing_else(run, monkeypatch):
    (run.path / "task/train.jsonl").write_text(json.dumps(dict(query="word " * 60)) + "\n")
    assert len(run()) == 6
    without_weights(monkeypatch)
    with pytest.raises(sami.BadInput, match="train.jsonl line 1: .*context of 256"):
        run(f"--queries={run.path}/task/train.jsonl", out="new.jsonl")
    with pytest.raises(sami.BadInput, match="train.jsonl line 1: .*context of 256"):
        run("--show")


def test_what_is_no_use_together(run, monkeypatch):
    without_weights(monkeypatch)
    with pytest.raises(sami.BadInput, match="--constitution.*--n"):
        run("--constitution=be", "--n=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sami.BadInput, match="with python"):
        run()


# ----------------------------------------------------------------------------------------- --show


@pytest.fixture
def show(tmp_path, capsys):
    """What --show prints for a task whose model folder has no weights."""
    def run(*more, template=None, **keys):
        flags = tiny.folder(tmp_path, **keys)[:2]
        (tmp_path / "base/model.safetensors").unlink()
        if template:
            (tokenizer := tiny.tokenizer()).chat_template = template
            tokenizer.save_pretrained(tmp_path / "base")
        capsys.readouterr()
        out = tmp_path / "responses.jsonl"
        out.write_text("of someone else")
        generate.main([*flags, f"--out={out}", "--max_new_tokens=8", "--show", *more])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "responses.jsonl", "task"]
        assert out.read_text() == "of someone else"
        return capsys.readouterr().out
    return run


def test_prompts_draws_and_filters_are_shown(show, tmp_path):
    printed = show("--n=3", response_prefix=" So", scoring_prompt="{constitution}, {query}:",
                   stop=["\n", "Q:"], drop_if_contains=["sorry"], first_must_end_with=".",
                   answer_after="Hence")
    task = sami.load_task(tmp_path / "task")
    cs = task.draw(np.random.default_rng((1, 1, 0, sami.DRAW)), 3)  # seed 1, iteration 1, query 0
    sampling, scoring, *draws, dropped = printed.split("--- ")[1:]
    assert sampling.startswith("a sampling prompt")
    assert f"tokens)\n{cs[0]}\nQ: train a\nA: So\n" in sampling
    assert scoring.startswith("a scoring prompt")
    assert f"tokens)\n{cs[0]}, train a:\n" in scoring
    assert draws == [f"c_{j}: {dict(zip(c.names, c.sides))}\n{c}\n" for j, c in enumerate(cs, 1)]
    assert dropped.startswith("cut and dropped, besides empty or equal ones: ")
    for rule in ("'answer_after': 'Hence'", "'stop': ['\\n', 'Q:']",
                 "'drop_if_contains': ['sorry']", "'first_must_end_with': '.'"):
        assert rule in dropped


def test_what_is_shown_is_what_a_run_samples_from(show, tmp_path):
    printed = show("--n=2", "--seed=5")
    flags = tiny.folder(tmp_path / "run")
    assert tiny.command(*flags, "--seed=5", "--batch_size=10")[0] == 0  # half of the queries
    rows = lines(tmp_path / "run/out/samples/iteration-1.jsonl")
    [first] = [row for row in rows if row["number"] == 0]
    for j, (c, sides) in enumerate(zip(first["constitutions"], first["sides"]), 1):
        assert f"--- c_{j}: {sides}\n{c}\n" in printed


def test_prompts_are_counted_in_tokens(show):
    # a prompt has 15 letters of constitution, 7 of query, 7 of template: 29 tokens
    assert show().count("(40 training queries: mean 29, at most 29 tokens)") == 2


def test_every_constitution_that_is_drawn_is_counted(show):
    """One side of one principle has 50 letters instead of 4, and 8 of 15 queries have it."""
    words = [dict(p) for p in tiny.PRINCIPLES]
    words[0]["positive"] = "x" * 50
    [counts] = {line.partition("(")[2] for line in show("--n=4", principles=words).splitlines()
                if "as the model reads it" in line}
    mean = int(counts.split("mean ")[1].partition(",")[0])
    assert 29 < mean < 75 and counts.endswith("at most 75 tokens)")


def test_what_fits_counts_tokens_prefix_and_held_out_principles(show, tmp_path, monkeypatch):
    # letters: "1. " + 50 + "\n2. " + 4, 7 of query, 7 of template, 3 of prefix: 78
    long = dict(name="long", positive="x" * 50, negative="do x", heldout=True)
    show(principles=[*tiny.PRINCIPLES, long], response_prefix=" So")
    flags = [f"--task={tmp_path}/task", f"--model={tmp_path}/base", "--show"]
    generate.main([*flags, "--max_new_tokens=178"])
    with pytest.raises(sami.BadInput, match="context of 256"):
        generate.main([*flags, "--max_new_tokens=179"])


def test_a_chat_models_prompt_is_shown_as_it_reads_it(show):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    printed = show(template=template, chat=True, sampling_prompt="Keep to this: {constitution}")
    assert "<eos>system: Keep to this: 1. " in printed and "\nuser: train a\na:\n" in printed


def test_a_constitution_of_ones_own_is_shown(show):
    printed = show("--constitution=be brief")
    assert printed.count("tokens)\nbe brief\nQ: train a\nA:\n") == 2
    assert printed.split("--- c_1: ")[1].split("\n")[1] == "be brief"


# ----------------------------------------------------------------------------- --write_principles


@pytest.mark.parametrize("text, wanted", [
    (" Write short sentences.\n- Write long sentences.\nName: x",
     ("Write short sentences.", "Write long sentences.")),
    ("+ Write short sentences. \n -  Write long sentences. ",
     ("Write short sentences.", "Write long sentences.")),  # the + again, and spaces
    (" Write short sentences.", None),  # no antithesis
    (" Write short sentences.\nWrite long sentences.", None),  # no dash
    (" Write short sentences.\n- Write short sentences.", None),  # twice the same
    (" Short.\n- Write long sentences.", None),  # too short to be a principle
    (" Short.           \n- Write long sentences.", None),
    (f" Write {'very ' * 60}short sentences.\n- Write long sentences.", None),  # too long
    (" Write {query} in short.\n- Write long sentences.", None),  # would be filled in as a template
])
def test_a_principle_has_exactly_one_form(text, wanted):
    assert generate.parse_principle(text) == wanted


@pytest.fixture
def write(tmp_path, monkeypatch):
    """--write_principles by a model that gives these answers -> what it read."""
    t = AutoTokenizer.from_pretrained(ROOT / "data/toy/base")

    def write(flag, *answers, out=f"{tmp_path}/p.jsonl"):
        left, read = iter(answers), []

        def sample(model, prompts, **how):
            read.extend((t.decode(p), key) for p, key in zip(prompts, how["seed"]))
            return [t(next(left), add_special_tokens=False).input_ids for _ in prompts]

        monkeypatch.setattr(sami, "sample", sample)
        generate.main([*TOY, f"--write_principles={flag}", f"--out={out}"])
        return read

    return write


BRIEF, KIND = " Be short about it.\n- Be long about it.", " Be kind to them.\n- Be harsh to them."


def test_principles_are_a_file_of_a_task(write, tmp_path):
    read = write("answer questions: brief, kind, brief", "Hm.\nName: no", BRIEF, KIND)
    assert [text.partition("doubt.\n")[2] for text, _ in read] == [
        f"Task: answer questions\nName: {name}\n+" for name in ("brief", "brief", "kind")]
    assert len({key for _, key in read}) == 3, "another try has other noise"
    tiny.folder(tmp_path / "new")
    (tmp_path / "p.json").replace(tmp_path / "new/task/principles.json")
    task = sami.load_task(tmp_path / "new/task")
    assert task.principles == [
        dict(name="brief", positive=["Be short about it."], negative=["Be long about it."],
             heldout=False),
        dict(name="kind", positive=["Be kind to them."], negative=["Be harsh to them."],
             heldout=False)] and not task.heldout


@pytest.mark.parametrize("text", ["[]\n", "notes"])
def test_principles_that_are_there_are_left_alone(write, tmp_path, monkeypatch, text):
    """Also those that it wrote: they may have been edited since."""
    write("answer questions: brief", BRIEF)
    written = (tmp_path / "p.json").read_text()
    without_weights(monkeypatch)
    for before in (written, text):
        (tmp_path / "p.json").write_text(before)
        with pytest.raises(sami.BadInput, match="p.json is there already; name another --out"):
            write("answer questions: brief", KIND)
        assert (tmp_path / "p.json").read_text() == before


def test_principles_that_came_up_meanwhile_are_left_alone(write, tmp_path, monkeypatch):
    def load(*args, real=sami.load_model):
        (tmp_path / "p.json").write_text("written by hand")
        return real(*args)

    monkeypatch.setattr(sami, "load_model", load)
    with pytest.raises(sami.RunFailed, match="p.json cannot be written.*exists"):
        write("answer questions: brief", BRIEF)
    assert (tmp_path / "p.json").read_text() == "written by hand"


def test_a_model_that_cannot_write_principles_says_so(tmp_path):
    with pytest.raises(sami.RunFailed, match="brief"):
        generate.main([*TOY, f"--out={tmp_path}/p.json",
                       "--write_principles=answer questions: brief"])
    assert not list(tmp_path.iterdir())
    for flag in ("answer questions", "answer questions: ", ": brief", "answer questions:,"):
        with pytest.raises(sami.BadInput, match="name, name"):
            generate.main([*TOY, f"--write_principles={flag}"])


# ------------------------------------------------------------------ lines that sami.py trains on


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--temperature=0.7", "--top_p=0.9"]],
                         ids=" ".join)
def test_lines_are_what_iteration_1_samples(run, flags):
    """Line for line those of sami.py with these flags; in their place, they are trained on."""
    rows = run("--n=2", f"--queries={run.path}/task/train.jsonl", *flags)
    assert len(rows) == 40
    assert tiny.command(*run.flags, *flags, f"--out_dir={run.path}/own")[0] == 0
    own = lines(run.path / "own/samples/iteration-1.jsonl")
    assert len(own) >= 8 and all(row == rows[row["number"]] for row in own)

    given = run.path / "out/samples/iteration-1.jsonl"
    given.parent.mkdir(parents=True)
    given.write_bytes((run.path / "r.jsonl").read_bytes())
    code, printed, err = tiny.command(*run.flags, *flags, "--resume")
    assert code == 0 and "iteration 1 step  2/2" in printed, err
    assert given.read_bytes() == (run.path / "r.jsonl").read_bytes(), "nothing was sampled"
    assert (run.path / "out/iteration-1/model.safetensors").is_file()


README = (ROOT / "README.md").read_text(encoding="utf-8")
[RECIPE] = [code for code in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
            if "vllm" in code]


class Engine:
    """What the recipe asks of vLLM, by Hugging Face's own generate."""

    def __init__(self, path, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(self, prompts, how):
        assert how.temperature == 0 and how.top_p == 1
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                       max_new_tokens=how.max_tokens, pad_token_id=0)
            text = self.tokenizer.decode(made[0, ids.shape[1]:], skip_special_tokens=True)
            yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])


@pytest.mark.parametrize("keys", [{}, dict(response_prefix=" So"), dict(answer_after="S")],
                         ids=str)
def test_samples_of_another_engine(tmp_path, monkeypatch, keys):
    flags = [*tiny.folder(tmp_path, **keys), "--max_new_tokens=24"]
    monkeypatch.setitem(sys.modules, "vllm",
                        SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    file = tmp_path / "out/samples/iteration-1.jsonl"
    file.parent.mkdir(parents=True)
    exec(compile(RECIPE, "recipe.py", "exec"), {})
    given = file.read_bytes()
    rows = lines(file)
    assert all(list(row) == ["number", "query", "constitutions", "responses"] for row in rows)

    code, printed, err = tiny.command(*flags, "--resume")
    assert code == 0 and "iteration 1 step  1/" in printed, err
    assert file.read_bytes() == given, "nothing was sampled"
    assert (tmp_path / "out/iteration-1/model.safetensors").is_file()

    assert tiny.command(*flags, f"--out_dir={tmp_path}/own")[0] == 0
    own = lines(tmp_path / "own/samples/iteration-1.jsonl")
    assert [row["number"] for row in rows][:len(own)] == [row["number"] for row in own]
    for row, mine in zip(rows, own):
        assert row["constitutions"] == mine["constitutions"]
        assert [text.strip() for text in row["responses"]] == mine["responses"]
