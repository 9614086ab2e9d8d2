"""A response is made once: generate.py goes on where it stopped; --show tells what is read."""
import json
from pathlib import Path

import numpy as np
import pytest

import generate, sami, tiny


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("text, wanted", [
    (" Write short sentences.\n- Write long sentences.\nName: x",
     ("Write short sentences.", "Write long sentences.")),
    (" Write short sentences.", None),  # no antithesis
    (" Write short sentences.\nWrite long sentences.", None),  # no dash
    (" Write short sentences.\n- Write short sentences.", None),  # twice the same
    (" Short.\n- Write long sentences.", None),  # too short to be a principle
    (" Write {query} in short.\n- Write long sentences.", None),  # would be filled in as a template
])
def test_a_principle_has_exactly_one_form(text, wanted):
    assert generate.parse_principle(text) == wanted


def test_a_stopped_run_goes_on(toy_flags, tmp_path):
    out = tmp_path / "responses.jsonl"
    generate.main([*toy_flags, f"--out={out}", "--limit=3"])
    first = lines(out)
    generate.main([*toy_flags, f"--out={out}", "--limit=5"])
    again = lines(out)
    assert again[:3] == first and len(again) == 5 and len({e["query"] for e in again}) == 5
    whole = tmp_path / "whole.jsonl"
    generate.main([*toy_flags, f"--out={whole}", "--limit=5"])
    assert lines(whole) == again  # as if it had never stopped


def test_a_constitution_of_ones_own(toy_flags, tmp_path):
    out = tmp_path / "responses.jsonl"
    generate.main([*toy_flags, f"--out={out}", "--limit=2", "--constitution=1. Sound excited."])
    assert [e["constitution"] for e in lines(out)] == ["1. Sound excited."] * 2


def test_a_file_that_holds_something_else_is_left_alone(toy_flags, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(sami.BadInput, match="notes.txt"):
        generate.main([*toy_flags, f"--out={out}"])
    assert out.read_text() == "my notes\n"


def test_a_model_that_cannot_write_principles_says_so(toy_flags, tmp_path):
    with pytest.raises(sami.RunFailed, match="brief"):
        generate.main([*toy_flags, f"--out={tmp_path}/p.json",
                       "--write_principles=answer questions: brief"])
    with pytest.raises(sami.BadInput, match="name, name"):
        generate.main([*toy_flags, "--write_principles=answer questions"])


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
        generate.main([*flags, f"--out={out}", "--max_new_tokens=8", "--show", *more])
        assert not out.exists()
        return capsys.readouterr().out
    return run


def test_prompts_draws_and_filters_are_shown(show, tmp_path):
    printed = show("--n=3", response_prefix=" So", scoring_prompt="{constitution}, {query}:",
                   stop=["\n", "Q:"], drop_if_contains=["sorry"], first_must_end_with=".",
                   answer_after="Hence")
    task = sami.load_task(tmp_path / "task")
    cs = task.draw(np.random.default_rng((1, 1, 0, sami.DRAW)), 3)  # seed 1, iteration 1, query 0
    sampling, scoring, draws, rules = printed.split("--- ")[1:5]
    assert sampling.startswith("a sampling prompt")
    assert f"tokens)\n{cs[0]}\nQ: train a\nA: So\n" in sampling
    assert scoring.startswith("a scoring prompt")
    assert f"tokens)\n{cs[0]}, train a:\n" in scoring
    assert draws.startswith("the 3 constitutions of this query\n")
    for j, c in enumerate(cs, 1):
        names = [name if side else f"not {name}" for name, side in zip(c.names, c.sides)]
        assert f"c_{j}: {', '.join(names)}\n{c}\n" in draws
    for line in ("a response starts behind 'Hence'",
                 "a response ends before any of ['\\n', 'Q:']",
                 "a query is dropped if a response contains any of ['sorry']",
                 "a query is dropped unless its first response ends with '.'"):
        assert line + "\n" in rules


def test_what_is_shown_is_what_a_run_samples_from(show, tmp_path):
    printed = show("--n=2", "--seed=5")
    flags = tiny.folder(tmp_path / "run")
    assert tiny.command(*flags, "--seed=5", "--batch_size=10")[0] == 0  # half of the queries
    rows = lines(tmp_path / "run/out/samples/iteration-1.jsonl")
    [first] = [row for row in rows if row["number"] == 0]
    shown = printed.split("--- ")[3]
    for j, (c, sides) in enumerate(zip(first["constitutions"], first["sides"]), 1):
        names = [name if side else f"not {name}" for name, side in sides.items()]
        assert f"c_{j}: {', '.join(names)}\n{c}\n" in shown


def test_prompts_are_counted_in_tokens(show):
    # a prompt has 15 letters of constitution, 7 of query, 7 of template: 29 tokens
    printed = show()
    assert printed.count("mean of 40 training queries: 29 tokens") == 2
    assert ("the longest prompt has 29 tokens; it and --max_new_tokens=8 fit the model's context "
            "of 256\n") in printed


def test_the_longest_prompt_counts_tokens_prefix_and_held_out_principles(show, tmp_path):
    # letters: "1. " + 50 + "\n2. " + 4, 7 of query, 7 of template, 3 of prefix
    long = dict(name="long", positive="x" * 50, negative="do x", heldout=True)
    printed = show(principles=[*tiny.PRINCIPLES, long], response_prefix=" So")
    assert "the longest prompt has 78 tokens" in printed
    flags = [f"--task={tmp_path}/task", f"--model={tmp_path}/base", "--show"]
    generate.main([*flags, "--max_new_tokens=178"])
    with pytest.raises(sami.BadInput, match="context of 256"):
        generate.main([*flags, "--max_new_tokens=179"])


def test_a_chat_models_prompt_is_shown_as_it_reads_it(show):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a:"
    printed = show(template=template, chat=True, sampling_prompt="Keep to this: {constitution}")
    assert "<eos>system: Keep to this: 1. " in printed and "\nuser: train a\na:\n" in printed


@pytest.fixture
def toy_flags():
    toy = Path(__file__).parent.parent / "data" / "toy"
    return [f"--task={toy}", f"--model={toy / 'base'}", "--device=cpu"]
