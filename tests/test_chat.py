"""A chat model is prompted in the format that it was tuned on: constitution as system message, query as the user's."""
import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import evaluate, generate, sami, tiny

ROOT = sami.Path(sami.__file__).parent
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
NO_SYSTEM = {"raises": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE,
             "leaves it out": TEMPLATE.replace("messages %}", "messages if m.role != 'system' %}")}
CHAT = dict(chat=True, sampling_prompt="Keep to this:\n{constitution}", scoring_prompt="{constitution}")
TALK = [dict(role="user", content="hi"), dict(role="assistant", content="yes?"), dict(role="user", content="do tell")]


def said(role, content):
    return dict(role=role, content=content)


def tokenizer(template=TEMPLATE):
    """tiny's, which puts a start token before a text like most do, with a chat template."""
    t = tiny.tokenizer()
    t.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 0)])
    t.chat_template = template
    return t


def by_hand(t, messages):
    return t.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.fixture
def make(tmp_path):
    """Write a task of 8 texts and 4 dialogues to train on, 2 and 1 to test, and a base -> path, flags."""
    def write(template=TEMPLATE, **keys):
        flags = tiny.folder(tmp_path, train=8, test=2, **keys)
        for name, count in dict(train=4, test=1).items():
            with open(tmp_path / "task" / f"{name}.jsonl", "a") as f:
                for i in range(count):
                    f.write(json.dumps(dict(query=[said("user", f"{name} {'wxyz'[i]}"), *TALK[1:]])) + "\n")
        tokenizer(template).save_pretrained(tmp_path / "base")
        return tmp_path, flags
    return write


# --------------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("x, turns", [("hi", TALK[:1]), (TALK, TALK)])
def test_a_prompt_has_the_ids_of_apply_chat_template(make, x, turns):
    task, t = sami.load_task(make(**CHAT)[0] / "task"), tokenizer()
    for prompt, system in ((task.sampling_prompt, "Keep to this:\n1. be"), (task.prompt, "1. be")):
        ids, prefix = sami.encode(t, prompt(x, "1. be"))
        assert ids == by_hand(t, [said("system", system), *turns]) and prefix == []
        assert t.decode(ids).startswith("<eos>system: ") and ids.count(0) == 1, "the template's start token, not two"
        assert t.decode(ids).endswith("\nassistant:"), "and now it is the model's turn"
    assert t("hi").input_ids[0] == 0, "a plain text does get one"


def test_the_opening_of_a_response_stands_behind_the_template():
    t, messages = tokenizer(), [said("system", "be"), *TALK]
    ids, prefix = sami.encode(t, messages, " So a")
    assert ids == by_hand(t, messages) and t.decode(prefix) == " So a"


@pytest.mark.parametrize("template", NO_SYSTEM.values(), ids=NO_SYSTEM)
@pytest.mark.parametrize("x, rest", [("hi", []), (TALK, TALK[1:])])
def test_without_a_system_role_the_constitution_opens_the_first_message(make, template, x, rest):
    task, t = sami.load_task(make(**CHAT)[0] / "task"), tokenizer(template)
    ids, _ = sami.encode(t, task.prompt(x, "1. be"))
    assert ids == by_hand(t, [said("user", "1. be\n\nhi"), *rest]) and "1. be" in t.decode(ids)


def test_a_constitution_is_never_filled_in_twice(make):
    task = sami.load_task(make(**CHAT)[0] / "task")
    assert task.prompt("{constitution}", "{constitution}") == [said("system", "{constitution}"),
                                                               said("user", "{constitution}")]


def test_a_plain_task_joins_the_messages_behind_its_labels(make, tmp_path):
    path, _ = make()
    assert sami.load_task(path / "task").prompt(TALK, "C") == "C\nQ: hi\n\nAssistant: yes?\n\nHuman: do tell\nA:"
    spec = dict(tiny.TASK, turns=["\nQ: ", "\nA: "])
    (path / "task/task.json").write_text(json.dumps(spec))
    assert sami.load_task(path / "task").prompt(TALK, "C") == "C\nQ: hi\nA: yes?\nQ: do tell\nA:"
    assert sami.load_task(path / "task").prompt("hi", "C") == "C\nQ: hi\nA:"


def test_one_message_is_the_same_as_its_text(make):
    path, _ = make()
    (path / "task/test.jsonl").write_text(json.dumps(dict(query=TALK[:1])) + "\n")
    assert [q["query"] for q in sami.load_task(path / "task").test] == ["hi"]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("query", [
    [], TALK[:2], TALK[1:], [TALK[0], TALK[0], TALK[0]], [said("system", "be"), *TALK], [said("user", " ")],
    [said("user", 7)], [dict(role="user")], ["hi"], "hi there".split(), {"role": "user", "content": "hi"}, None])
def test_a_dialogue_that_is_none(make, query):
    path, flags = make(**CHAT)
    with open(path / "task/train.jsonl", "a") as f:
        f.write(json.dumps(dict(query=query)) + "\n")
    code, _, err = tiny.command(*flags)
    assert code == 2 and f"{path}/task/train.jsonl line 13 " in err and "the user first and last" in err


def test_a_dialogue_in_train_and_test(make):
    path, flags = make(**CHAT)
    (path / "task/train.jsonl").write_text((path / "task/test.jsonl").read_text())
    (path / "task/test.jsonl").write_text(json.dumps(dict(query=[said("user", "test w"), *TALK[1:]])) + "\n")
    code, _, err = tiny.command(*flags)
    assert code == 2 and "user: test w" in err and "remove it" in err


@pytest.mark.parametrize("keys, words", [
    (dict(CHAT, scoring_prompt="{constitution} {query}"), ["scoring_prompt", "system message", "remove {query}"]),
    (dict(CHAT, sampling_prompt="Be kind."), ["sampling_prompt", "{constitution}"]),
    (dict(CHAT, chat="yes"), ["chat", "bool"]), (dict(turns=["\nQ: "]), ["turns", "two texts"]),
    (dict(turns="\nQ: "), ["turns", "list"])])
def test_a_key_of_a_chat_task(make, keys, words):
    path, flags = make(**keys)
    code, _, err = tiny.command(*flags)
    assert code == 2 and f"{path}/task/task.json" in err and all(word in err for word in words), err


@pytest.mark.parametrize("template, word", [
    (None, "has no chat template"), ("{{ raise_exception('no') }}", "cannot take these messages"),
    ("no messages at all", "cannot take these messages")])
def test_a_model_without_a_template_that_fits(make, monkeypatch, template, word):
    path, flags = make(template, **CHAT)
    for file in (path / "base").glob("*.jinja") if template is None else ():
        file.unlink()
    monkeypatch.setattr(sami, "load_model", lambda *_: pytest.fail("small files should have stopped the run before"))
    code, _, err = tiny.command(*flags)
    assert code == 2 and f"--model={path}/base" in err and word in err and "choose" in err, err
    with pytest.raises(sami.BadInput, match=word):
        generate.main([*flags[:2], "--device=cpu", f"--out={path}/r.jsonl"])
    with pytest.raises(sami.BadInput, match=word):
        generate.main([flags[1], "--device=cpu", "--chat", "--write_principles=answer: brief", f"--out={path}/p.json"])


def test_a_dialogue_longer_than_the_context(make):
    path, flags = make(**CHAT)
    with open(path / "task/train.jsonl", "a") as f:
        f.write(json.dumps(dict(query=[*TALK[:2], said("user", "word " * 60)])) + "\n")
    code, _, err = tiny.command(*flags)
    assert code == 2 and "line 13" in err and "context of 256" in err


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("keys", [CHAT, {}], ids=["chat", "plain"])
@pytest.mark.parametrize("judge", ["rules", "model"])
def test_a_run_on_dialogues_and_its_evaluation(make, monkeypatch, capsys, keys, judge):
    path, flags = make(**keys)
    monkeypatch.setattr(evaluate, "picture", lambda *_: None)  # slow, and looked at elsewhere
    code, printed, err = tiny.command(*flags, "--eval_queries=3", "--batch_size=3", "--temperature=1")
    assert code == 0 and "iteration 1 step  2/2" in printed, err
    rows = [json.loads(line) for line in open(path / "out/samples/iteration-1.jsonl")]
    assert {type(row["query"]) for row in rows} == {str, list}, "messages stay messages"
    prompts = [tokenizer().decode(p) for row in rows if row["query"][1:] == TALK[1:] for p in row["prompts"]]
    end = "\nassistant: yes?\nuser: do tell\nassistant:" if keys else "\n\nAssistant: yes?\n\nHuman: do tell\nA:"
    assert prompts and all(p.endswith(end) for p in prompts)

    (path / "task/rules.py").write_text("".join(  # a rule reads a dialogue as one text
        f"def p{i}(query, response): return query.split()[0] in ('test', 'user:') and len(response) > {i}\n"
        for i in range(1, 7)) + "def in_world(query, response): return query.split()[0] in ('test', 'user:')\n")
    tiny.model(max_position_embeddings=1024).save_pretrained(path / "judge")
    tokenizer().save_pretrained(path / "judge")
    flags = [f"--out_dir={path}/out", "--device=cpu", "--judge=" + dict(model=f"model:{path}/judge").get(judge, judge)]
    evaluate.main(flags)
    results = json.loads((path / "out/results.json").read_text())["models"]["iteration-1"]
    assert 0 <= results["win_rate"] <= 1 and 0 <= results["adherence"] <= 1 and results["infonce"] is not None
    assert results["in_world_rate"] == 1
    assert "user: test w assistant: yes? user: do tell" in (path / "out/report.md").read_text()

    stored = path / "out/responses/iteration-1.jsonl"  # what was written can be read again, next to a model
    assert any(json.loads(line)["query"] == [said("user", "test w"), *TALK[1:]] for line in open(stored))
    evaluate.main([*flags, f"--out_dir={path}/again", f"--models=base={path}/base,it={stored}", f"--task={path}/task",
                   "--max_new_tokens=8"])
    again = json.loads((path / "again/results.json").read_text())["models"]["it"]
    assert again["adherence"] == results["adherence"] and again["win_rate"] == results["win_rate"]
    capsys.readouterr()


def test_a_file_with_a_broken_dialogue_is_named(make):
    path, _ = make(**CHAT)
    (path / "b.jsonl").write_text(json.dumps(dict(query=TALK[:2], constitution="c", response="r")) + "\n")
    with pytest.raises(sami.BadInput, match="b.jsonl line 1 .*messages"):
        evaluate.main([f"--models=b={path}/b.jsonl", f"--task={path}/task", f"--judge=model:{path}/base",
                       f"--out_dir={path}/out", "--device=cpu"])


def test_a_judge_reads_a_dialogue_as_one_json_string():
    prompt = evaluate.judge_prompt(dict(query=TALK, constitution="1. be"), "a", "b")
    assert 'Request: "user: hi\\nassistant: yes?\\nuser: do tell"\n' in prompt


def test_generate_goes_on_behind_dialogues(make):
    path, flags = make(**CHAT)
    flags = [*flags[:2], "--device=cpu", "--max_new_tokens=4", f"--out={path}/r.jsonl"]
    queries = TALK, "hi", [*TALK[:2], said("user", "and now")]
    (path / "more.jsonl").write_text("".join(json.dumps(dict(query=x)) + "\n" for x in queries))
    flags.append(f"--queries={path}/more.jsonl")
    generate.main([*flags, "--limit=1"])
    first = (path / "r.jsonl").read_text()
    assert json.loads(first)["query"] == TALK and json.loads(first)["chat"] is True
    generate.main(flags)
    rows = (path / "r.jsonl").read_text()
    assert rows.startswith(first) and rows.count("\n") == 3
    generate.main(flags)
    assert (path / "r.jsonl").read_text() == rows, "everything was there"


# ------------------------------------------------------------------------------------------------- generate.py --chat


def test_chat_makes_a_plain_prompt_the_users_message(make, monkeypatch):
    path, flags = make()
    flags, read = [*flags[:2], "--device=cpu", "--limit=3", "--constitution=1. be", f"--out={path}/r.jsonl"], []
    real = sami.sample
    monkeypatch.setattr(sami, "sample", lambda net, prompts, **how: read.extend(prompts) or real(net, prompts, **how))
    generate.main([*flags, "--chat", "--max_new_tokens=4"])
    asked = "test a", "test b", "test w\n\nAssistant: yes?\n\nHuman: do tell"
    assert read == [by_hand(tokenizer(), [said("user", f"1. be\nQ: {text}\nA:")]) for text in asked]
    assert all(json.loads(line)["chat"] for line in open(path / "r.jsonl"))
    with pytest.raises(sami.BadInput, match="other flags"):
        generate.main([*flags, "--max_new_tokens=4"])  # not mixed with responses to the plain prompts


def test_principles_by_a_chat_model(tmp_path, monkeypatch):
    t, read = AutoTokenizer.from_pretrained(ROOT / "data/toy/base"), []
    t.chat_template = TEMPLATE
    answers = iter(["Sure! Here they are:\n+ a", "+ Write short sentences.\n- Write long sentences."])

    def sample(model, prompts, **how):
        read.append(t.decode(prompts[0]))
        return [t(next(answers), add_special_tokens=False).input_ids]

    monkeypatch.setattr(sami, "load_tokenizer", lambda path: (None, t))
    monkeypatch.setattr(sami, "load_model", lambda *_: tiny.model())
    monkeypatch.setattr(sami, "sample", sample)
    generate.main(["--chat", "--write_principles=answer: brief", f"--out={tmp_path}/p.json", "--device=cpu"])
    assert [(p["name"], p["positive"], p["negative"]) for p in json.loads((tmp_path / "p.json").read_text())] == [
        ("brief", "Write short sentences.", "Write long sentences.")]
    assert len(read) == 2, "an answer of another form is asked for again"
    assert "user: Write the two lines" in read[0] and read[0].endswith("Name: brief\n+\nassistant:")
