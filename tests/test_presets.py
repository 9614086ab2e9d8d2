"""A preset is the paper's Table 1 in one file: values, draws, filters, halves, in a short run."""
import json
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sami, tiny

ROOT = sami.Path(sami.__file__).parent
ROOT = sami.Path(sami.__file__).parent
PRESETS = ["hh/mistral-7b", "tldr/mistral-7b", "tldr/mixtral-8x7b", "principles/llama3-70b"]
# What the model can say: a word at a time it would take thousands of tries to come to a full stop,
# or to "Summary:".
SAYINGS = "Ann sings.", "It rains.", "He left.", "All is well.", "They wait.", "Say no."
SAYINGS = [f" Summary: {s}" for s in SAYINGS]
SAYINGS += [" It snows.", " I saw a [cat].", " I am sorry.", " And then"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model with a token for each byte, which reads any prompt, and one for each saying,
    which it prefers."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    said = [spell.pre_tokenize_str(text)[0][0] for text in SAYINGS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # no merges: text is read byte by byte
    vocab = {t: i for i, t in enumerate(["<eos>", *letters, *said])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer, inner.decoder = spell, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>",
                                        bos_token="<eos>")
    net = tiny.model(vocab_size=len(vocab), max_position_embeddings=4096, scale=0.5)
    with torch.no_grad():
        net.lm_head.weight[:-len(said)] = 0  # logits of 0, which some saying nearly always exceeds
    path = tmp_path_factory.mktemp("base")
    net.save_pretrained(path), tokenizer.save_pretrained(path)
    return path

@pytest.fixture(scope="module", params=[*PRESETS, "task-cot"])
def ran(request, base, tmp_path_factory):
    """Two short iterations of a preset on its committed queries."""
    preset = request.param if request.param in PRESETS else "principles/llama3-70b"
    task = f"data/{preset.split('/')[0]}"
    flags = ["--task=data/principles/task-cot.json"] if request.param == "task-cot" else []
    out = tmp_path_factory.mktemp(request.param.replace("/", "-")) / "out"
    preset = f"data/{preset}.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        code, printed, err = tiny.command(
            f"--preset={preset}", *flags, f"--model={base}", f"--out_dir={out}", "--device=cpu",
            "--iterations=2", "--steps=1", "--batch_size=2", "--max_new_tokens=4",
            "--eval_queries=2")
    assert code == 0, printed + err
    read = lambda path: [json.loads(line) for line in open(path)]
    samples = [read(out / "samples" / f"iteration-{k}.jsonl") for k in (1, 2)]
    path = ROOT / (flags[0].removeprefix("--task=") if flags else f"{task}/task.json")
    return dict(preset=preset, out=out, printed=printed, samples=samples,
                log=read(out / "log.jsonl"), spec=json.loads(path.read_text()))


def test_a_preset_runs_to_its_end(ran):
    assert all((ran["out"] / f"iteration-{k}" / "model.safetensors").is_file() for k in (1, 2))
    steps = [row for row in ran["log"] if "step" in row]
    assert [(row["iteration"], row["step"]) for row in steps] == [(1, 1), (2, 1)]
    assert all(0 < row["loss"] < 3 for row in steps), "some examples were trained on"
    assert not any("kl" in row for row in steps), "with no KL"
    assert [row["iteration"] for row in ran["log"] if "infonce" in row] == [0, 1, 2]


def test_table_1_arrives_in_the_run(ran):
    config = json.loads((ran["out"] / "sami.json").read_text())["config"]
    wanted = dict(lr=5e-7, n=2, beta=0.0, temperature=0.0, restart=True, contrast="two-sided",
                  reduce="mean", grad_clip=1.0, preset=ran["preset"],
                  optimizer="adamw" if "mistral" in ran["preset"] else "rmsprop")
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("preset, steps, model", [
    ("hh/mistral-7b", "2,4,6", "mistralai/Mistral-7B-v0.1"),
    ("tldr/mistral-7b", "2,4,6", "mistralai/Mistral-7B-v0.1"),
    ("tldr/mixtral-8x7b", "2,4,6", "mistralai/Mixtral-8x7B-v0.1"),
    ("principles/llama3-70b", "4,8,12", "meta-llama/Meta-Llama-3-70B")])
def test_what_the_short_runs_leave_out_is_table_1_too(preset, steps, model):
    cfg = sami.parse(sami.Config, [f"--preset={ROOT}/data/{preset}.json"])
    assert (cfg.iterations, cfg.batch_size, cfg.max_new_tokens) == (3, 128, 350)
    assert (cfg.model, cfg.steps, cfg.task) == (model, steps, f"data/{preset.split('/')[0]}")


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for p in ROOT.glob("data/*/*.json")
                                        if "model" in json.loads(p.read_text())))
def test_a_preset_lies_beside_its_task_and_ones_own_flags_win(path):
    values, flag = json.loads((ROOT / path).read_text()), f"--preset={ROOT / path}"
    cfg = sami.parse(sami.Config, [flag])
    assert {key: getattr(cfg, key) for key in values} == values
    assert values["task"] == str(path.parent) and sami.load_task(ROOT / values["task"]).train
    assert sami.parse(sami.Config, ["--lr=0.25", flag]).lr == 0.25, "wherever it stands"
    assert sami.parse(sami.Config, [flag, "--restart"]).restart


def test_every_example_was_dropped_for_the_reason_it_gives(ran):
    """task.json's filters once more, and what the run printed about them."""
    spec = ran["spec"]
    for k, rows in enumerate(ran["samples"], 1):
        for row in rows:
            y = row["responses"]
            bad = [s for s in spec["drop_if_contains"] if any(s in t for t in y)]
            end = spec["first_must_end_with"]
            reasons = ["empty response"] * ("" in y) + ["identical responses"] * (y[0] == y[1])
            reasons += [f"contains {s!r}" for s in bad]
            reasons += [f"first response does not end with {end!r}"] * (not y[0].endswith(end))
            assert row["dropped"] == (reasons[0] if reasons else None), y
        reasons = Counter(row["dropped"] for row in rows)
        line = next(s for s in ran["printed"].splitlines() if s.startswith(f"iteration {k}: "))
        assert f"{len(rows)} queries sampled, {reasons.pop(None)} usable" in line
        assert all(f"{count} dropped: {why}" in line for why, count in reasons.items())
    dropped = [row["dropped"] for rows in ran["samples"] for row in rows]
    assert any(dropped), "the filters had something to do"


@pytest.mark.parametrize("task, y, why", [
    ("hh", ["Wait a day.", "Take it back."], None), ("hh", ["Wait a day", "Take it back."], None),
    ("hh", ["I'm sorry, no.", "Take it."], "contains 'sorry'"),
    ("hh", ["Yes.", "Response: no"], "contains 'Response'"),
    ("hh", ["The assistant waits.", "No."], "contains 'The assistant'"),
    ("hh", ["Yes.", "(x) [y]"], "contains ']'"),
    ("tldr", ["The post is sad.", "The post is"], None),
    ("tldr", ["The post is", "It."], "end with '.'"),
    ("tldr", ["It.", "The [insert the summary]"], "contains '[insert'"),
    ("tldr", ["It.", "[]"], "contains '[]'"),
    ("tldr", ["It.", "It."], "identical"), ("tldr", ["It.", ""], "empty"),
    ("principles", ["Arr.", "No."], None), ("principles", ["Arr!", "No."], "end with '.'"),
    ("principles/task-cot.json", ["Arr.", "My principles say no."], "contains 'principles'"),
    ("principles/task-cot.json", ["The post is sad.", "Arr."], "contains 'The post'")])
def test_what_each_task_drops(task, y, why):
    found = sami.load_task(ROOT / "data" / task).drop(y)
    assert found is None if why is None else why in found


def test_with_reasoning_only_the_answer_is_scored():
    task = sami.load_task(ROOT / "data/principles/task-cot.json")
    said = " it should be short. \n\nSummary: A man waits.\n\nHuman: Thanks"
    assert task.clean(said) == "A man waits."
    assert task.clean(" it should be short, and so on") == "", "an answer that never came"
    x, [c] = task.test[0]["query"], task.draw(np.random.default_rng(1), 1)
    assert "Reasoning:" in task.sampling_prompt(x, c) and "Reasoning:" not in task.prompt(x, c)
    assert task.prompt(x, c).endswith("\n\nSummary:")


@pytest.mark.parametrize("task", ["hh", "tldr", "principles", "principles/task-cot.json"])
def test_no_model_samples_for_queries_it_was_trained_on(task, tmp_path, monkeypatch):
    """The whole halves, not just the part of them that a short run needs."""
    task, cfg, halves = sami.load_task(ROOT / "data" / task), sami.Config(out_dir=str(tmp_path)), []
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr(sami, "sample_examples", lambda model, tokenizer, task, queries, *rest: [
        sami.Example(i, q["query"], [], []) for i, q in queries])
    for k in (1, 2, 3):
        halves.append({e.query for e in sami.collect(None, None, task, cfg, k, 10**6)})
    everything = {q["query"] for q in task.train}
    assert not halves[0] & halves[1] and not halves[1] & halves[2]
    assert halves[0] | halves[1] == everything
    assert not everything & {q["query"] for q in task.test}


def test_each_half_of_hh_asks_for_help_and_tempts_to_harm():
    """Were one half all helpful queries, an iteration would never see a harmless one."""
    focus = [q["focus"] for q in sami.load_task(ROOT / "data/hh").train]
    assert set(focus[0::2]) == set(focus[1::2]) == {"helpful", "harmless"}


def test_a_short_run_samples_another_half_in_each_iteration(ran):
    first, second = ({row["query"] for row in rows} for rows in ran["samples"])
    assert first and second and not first & second


FOUR = {(a, b): 1 / 4 for a in (True, False) for b in (True, False)}


def chi_square(found, wanted):
    """Counts and probabilities with the same keys -> sum of (count - expected)^2 / expected."""
    total = sum(found.values())
    assert set(found) <= set(wanted) and abs(sum(wanted.values()) - 1) < 1e-9
    return sum((found.get(key, 0) - total * p) ** 2 / (total * p) for key, p in wanted.items())


def drawn(task, focus=None):
    """10,000 draws of two constitutions from a fixed seed -> pairs of {principle: side}; the
    task."""
    task, draw = sami.load_task(ROOT / "data" / task), np.random.default_rng(0)
    pairs = [task.draw(draw, 2, focus) for _ in range(10_000)]
    orders = Counter((a.names[0] < a.names[1], b.names[0] < b.names[1]) for a, b in pairs)
    assert chi_square(orders, FOUR) < 16.3, "each in an order of its own"
    return [tuple(dict(zip(c.names, c.sides)) for c in pair) for pair in pairs], task


# The limits are where chance alone would come in one of a thousand: 10.8, 13.8, 16.3 with 1, 2, 3
# degrees of freedom.
@pytest.mark.parametrize("focus, other", [("helpful", "harmless"), ("harmless", "helpful")])
def test_hh_negates_the_focus_and_tosses_a_coin_for_the_other(focus, other):
    pairs, _ = drawn("hh", focus)
    assert all(first == {focus: True, other: True} and not second[focus] for first, second in pairs)
    others = Counter(second[other] for _, second in pairs)
    assert chi_square(others, {True: 1 / 2, False: 1 / 2}) < 10.8


def test_tldr_contrasts_the_positive_with_each_of_three_negations_equally_often():
    pairs, _ = drawn("tldr")
    assert all(first == dict(concise=True, comprehensive=True) for first, _ in pairs)
    seconds = Counter((second["concise"], second["comprehensive"]) for _, second in pairs)
    thirds = {(True, False): 1 / 3, (False, True): 1 / 3, (False, False): 1 / 3}
    assert chi_square(seconds, thirds) < 13.8


@pytest.mark.parametrize("task", ["principles", "principles/task-cot.json"])
def test_principles_draws_any_two_of_fifteen_with_random_sides_and_then_their_opposites(task):
    pairs, task = drawn(task)
    opposite = lambda sides: {name: not side for name, side in sides.items()}
    assert all(second == opposite(first) for first, second in pairs)
    names = [p["name"] for p in task.principles]
    assert len(names) == 15 and len(task.heldout) == 5
    sides = Counter(tuple(side for _, side in sorted(first.items())) for first, _ in pairs)
    assert chi_square(sides, FOUR) < 16.3
    who = Counter(frozenset(first) for first, _ in pairs)
    every = {frozenset((a, b)): 1 / 105 for i, a in enumerate(names) for b in names[:i]}
    assert chi_square(who, every) < 153, "104 degrees of freedom"
