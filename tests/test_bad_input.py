"""Bad input ends in one sentence that names the thing and the fix, exit code 2; a failure: 1."""
import json, re, shutil

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import sami, tiny

ROOT = sami.Path(sami.__file__).parent
PRESETS = [p for p in sorted(ROOT.glob("data/*/*.json"))
           if "lr" in json.loads(p.read_text())]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    tiny.folder(path)
    return path


@pytest.fixture
def space(good, tmp_path):
    """A fresh copy of a task and base that work, and the command line with flags added."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)

    class Space:
        path, task, out = tmp_path, tmp_path / "task", tmp_path / "out"

        flags = [f"--task={tmp_path}/task", f"--model={tmp_path}/base", f"--out_dir={tmp_path}/out",
                 "--device=cpu", "--n=2", "--batch_size=4", "--max_new_tokens=8",
                 "--eval_queries=0", "--iterations=1", "--steps=1"]

        def edit(self, **keys):
            (self.task / "task.json").write_text(json.dumps({**tiny.TASK, **keys}))

        def add(self, **row):
            with open(self.task / "train.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

        def told(self, *words, flags=(), code=2):
            """Exit code and one sentence that holds these words."""
            got, _, err = tiny.command(*self.flags, *flags)
            assert got == code, err
            assert err.startswith("error: ") and err.count("\n") == 1, err
            for word in words:
                assert str(word) in err, f"{word!r} is not in {err!r}"

        def refused(self, *words, flags=()):
            """The same, and nothing of a run is left behind."""
            self.told(*words, flags=flags)
            assert not self.out.exists()

    return Space()


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flag, words", [
    ("--learning_rate=1", ["--learning_rate=1", "--help"]),
    ("--batchsize=1", ["--batchsize=1", "--help"]),
    ("--batch=1", ["--batch=1", "--help"]),  # no abbreviations
    ("lr=1", ["lr=1", "--help"]),
    ("--lr", ["--lr", "argument"]),
    ("--lr=fast", ["--lr", "fast", "float"]),
    ("--n=2.5", ["--n", "2.5", "int"]),
    ("--restart=maybe", ["--restart", "maybe", "True, False"]),
    ("--resume=", ["--resume", "True, False"]),
    ("--parallel=tp", ["--parallel", "tp", "auto", "ddp", "fsdp"]),
    ("--sample_batch=0", ["--sample_batch=0", "between 1"]),
    ("--tokens_per_pass=0", ["--tokens_per_pass=0", "between 1"]),
    ("--eval_queries=-1", ["--eval_queries=-1", "between 0"]),
    ("--grad_clip=-1", ["--grad_clip=-1", "between 0"]),
    ("--preset=nope", ["nope", "No such file"]),
    ("--optimizer=sgd", ["--optimizer", "sgd", "rmsprop"]),
    ("--contrast=none", ["--contrast", "none", "two-sided"]),
    ("--reduce=max", ["--reduce", "max", "mean"]),
    ("--n=1", ["--n=1", "between 2"]),
    ("--lr=-1", ["--lr=-1"]),
    ("--lr=nan", ["--lr=nan"]),
    ("--temperature=-1", ["--temperature=-1"]),
    ("--top_p=0", ["--top_p=0"]),
    ("--top_p=1.5", ["--top_p=1.5", "1"]),
    ("--batch_size=0", ["--batch_size=0"]),
    ("--steps=two", ["--steps=two", "whole number"]),
    ("--steps=2,4", ["--steps=2,4", "--iterations=1"]),
    ("--steps=0", ["--steps=0"]),
    ("--device=tpu", ["--device", "tpu", "cpu"]),
])
def test_flags(space, flag, words):
    space.refused(*words, flags=[flag])


def test_flags_fail_before_anything_loads(space, monkeypatch):
    for name in ("load_task", "load_tokenizer", "load_model"):
        monkeypatch.setattr(sami, name, lambda *_: pytest.fail("this flag should have stopped it"))
    space.refused("--nope", flags=["--nope=1"])
    space.refused("--steps=0", flags=["--steps=0"])


def test_a_preset_gives_values_and_flags_override_them():
    preset = f"--preset={ROOT}/data/tldr/mixtral-8x7b.json"
    cfg = sami.parse(sami.Config, ["--lr=1e-6", preset, "--restart=False"])
    assert (cfg.lr, cfg.batch_size, cfg.n, cfg.optimizer, cfg.beta, cfg.grad_clip, cfg.restart) == (
        1e-6, 128, 2, "rmsprop", 0, 1, False)
    assert len(PRESETS) >= 6
    for path in PRESETS:
        sami.parse(sami.Config, [f"--preset={path}"])


@pytest.mark.parametrize("text, words", [
    ("{", ["my.json", "JSON object", "line 1"]), ("[1]", ["my.json", "object"]),
    ('{"learning_rate": 1}', ["--learning_rate=1", "--help"]), ('{"lr": -1}', ["--lr=-1"]),
    ('{"restart": "maybe"}', ["--restart", "maybe"]), ('{"lr": null}', ["--lr", "None"])])
def test_a_preset_is_checked_as_flags_are(space, text, words):
    (space.path / "my.json").write_text(text)
    space.refused(*words, flags=[f"--preset={space.path}/my.json"])


def test_a_flag_that_is_true_or_false_needs_no_value():
    cfg = sami.parse(sami.Config, ["--resume", "--restart=false"])
    assert cfg.resume is True and cfg.restart is False and sami.Config().resume is False


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        sami.parse(sami.Config, ["--help"])
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert all(f"--{name}" in printed for name in sami.Config.__annotations__)


# -------------------------------------------------------------------------------------------- task


@pytest.mark.parametrize("name", ["task.json", "principles.json", "train.jsonl", "test.jsonl"])
def test_a_missing_file(space, name):
    (space.task / name).unlink()
    space.refused(space.task / name, "missing")


def test_a_missing_task(space):
    space.refused(f"{space.path}/nope", "task.json", flags=[f"--task={space.path}/nope"])


@pytest.mark.parametrize("line", ['{"query": "a"', "plain text", '"a string"', '{"question": "a"}',
                                  '{"query": ""}', '{"query": 7}', "[]", "7"])
def test_a_malformed_line(space, line):
    with open(space.task / "train.jsonl", "a") as f:
        f.write(line + "\n")
    space.refused(space.task / "train.jsonl", "line 41", "query")


def test_bytes_that_are_no_text(space):
    (space.task / "train.jsonl").write_bytes(b'{"query": "caf\xe9"}\n')
    space.refused(space.task / "train.jsonl")


@pytest.mark.parametrize("text", ["", "\n"])
def test_no_queries(space, text):
    (space.task / "test.jsonl").write_text(text)
    space.refused(space.task / "test.jsonl", "quer")


def test_a_focus_that_is_no_principle(space):
    space.add(query="x", focus="p9")
    space.refused(space.task / "train.jsonl", "line 41", "focus", "p9")


def test_a_query_in_train_and_test(space):
    with open(space.task / "test.jsonl", "a") as f:
        f.write('{"query": "train a"}\n')
    space.refused("train a", "train.jsonl", "test.jsonl")


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"text"'])
@pytest.mark.parametrize("name", ["task.json", "principles.json"])
def test_json_that_is_broken_or_of_another_kind(space, name, text):
    (space.task / name).write_text(text)
    space.refused(space.task / name)


@pytest.mark.parametrize("keys, words", [
    (dict(sampling_prompt="{constitution}"), ["sampling_prompt", "{query}"]),
    (dict(sampling_prompt="{query}"), ["sampling_prompt", "{constitution}"]),
    (dict(scoring_prompt="{constitution}"), ["scoring_prompt", "{query}"]),
    (dict(sampling_prompt=7), ["sampling_prompt"]),
    (dict(stop="\n"), ["stop", "list"]),
    (dict(stop=[""]), ["stop"]),
    (dict(stop=[7]), ["stop"]),
    (dict(drop_if_contains=[7]), ["drop_if_contains"]),
    (dict(others="opposite"), ["others", "complement"]),
    (dict(principles_per_constitution=0), ["principles_per_constitution", "between 1 and the 4"]),
    (dict(principles_per_constitution=5), ["principles_per_constitution", "between 1 and the 4"]),
    (dict(first_always_positive="no"), ["first_always_positive"]),
    (dict(stopp=[]), ["stopp"]),
])
def test_a_key_of_task_json(space, keys, words):
    space.edit(**keys)
    space.refused(space.task / "task.json", *words)


def test_no_sampling_prompt(space):
    (space.task / "task.json").write_text("{}")
    space.refused(space.task / "task.json", "sampling_prompt")


@pytest.mark.parametrize("change, words", [
    (dict(negative=None), ["2", "negative", "antithesis"]),
    (dict(negative=[]), ["2", "negative"]),
    (dict(negative=""), ["2", "negative"]),
    (dict(positive=[1, 2]), ["2", "positive"]),
    (dict(positive=7), ["2", "positive"]),
    (dict(name=""), ["2", "name"]),
    (dict(name="p1"), ["p1"]),  # the name of another principle
    (dict(heldout="false"), ["2", "heldout"]),  # a text, and so true
    (dict(held_out=True), ["2", "held_out", "nothing else"]),  # a slip would train on it
    (dict(negative="do s"), ["2", "antithesis", "do s"]),  # both sides ask for the same
    (dict(positive=["yes", "do it"], negative=["no", "do it"]), ["2", "antithesis", "do it"]),
    (dict(name=" "), ["2", "name"]),
    (dict(positive=" \n"), ["2", "positive"]),
    (dict(negative=["no", "\t"]), ["2", "negative"]),
])
def test_a_principle_that_is_none(space, change, words):
    principles = [dict(p) for p in tiny.PRINCIPLES]
    principles[1].update(change)
    (space.task / "principles.json").write_text(json.dumps(principles))
    space.refused(space.task / "principles.json", "principle 2 ", *words)


def test_more_constitutions_than_can_be_drawn(space):
    space.refused(space.task, "5", "4", "principles_per_constitution", flags=["--n=5"])
    space.add(query="x", focus="p2")
    space.refused(space.task, "4", "3", flags=["--n=4"])  # fewer are left where a query has a focus


def test_too_few_queries_for_two_halves(space):
    (space.task / "train.jsonl").write_text('{"query": "x"}\n')
    space.refused(space.task, "quer", "two")


# ------------------------------------------------------------------------------------------- model


def test_a_folder_that_is_no_model(space, monkeypatch):
    for name in ("task", "nope"):
        model = f"--model={space.path}/{name}"
        space.refused(model, *["config.json"] * (name == "task"), flags=[model])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting
    space.refused("no_such_model", flags=["--model=no_such_model"])


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nope"}'])
def test_a_broken_config(space, text):
    (space.path / "base" / "config.json").write_text(text)
    space.refused(f"--model={space.path}/base")


@pytest.mark.parametrize("damage", ["missing", "cut short", "of another shape"])
def test_broken_weights(space, damage):
    file = space.path / "base" / "model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        tiny.model(hidden_size=16).save_pretrained(space.path / "other")
        shutil.copy(space.path / "other" / "model.safetensors", file)
    space.told(f"--model={space.path}/base")


def test_a_weight_that_is_not_there_is_never_made_up(space):
    file, name = space.path / "base" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata=dict(format="pt"))
    space.told(f"--model={space.path}/base", name)


def test_code_that_a_model_brings_is_not_run(space, monkeypatch):
    """And nobody is asked on standard input, where a `y` might be waiting."""
    asked, ran = [], space.path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    (space.path / "base" / "strange.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w')\n"
        "class Strange(LlamaConfig):\n    model_type = 'strange'\n")
    config = json.loads((space.path / "base" / "config.json").read_text())
    config.update(model_type="strange", auto_map=dict(AutoConfig="strange.Strange"))
    (space.path / "base" / "config.json").write_text(json.dumps(config))
    space.refused(f"--model={space.path}/base", "custom code")
    assert not asked and not ran.exists()


# ----------------------------------------------------------------------------------------- lengths


def test_a_prompt_longer_than_the_context(space):
    space.add(query="word " * 60)
    space.refused(space.task / "train.jsonl", "line 41", "256", "context")


def test_lengths_are_of_tokens_and_every_query_counts(space):
    """60 emoji are 240 tokens of a tokenizer of bytes, though 20 others have more letters."""
    t = AutoTokenizer.from_pretrained(ROOT / "data/toy/base")
    t.save_pretrained(space.path / "base")
    tiny.model(vocab_size=len(t), eos_token_id=t.eos_token_id).save_pretrained(space.path / "base")
    for i in range(20):
        space.add(query=f"is it {i:02} " + "or so " * 12)
    space.add(query="\N{ghost}" * 60)
    space.refused(space.task / "train.jsonl", "line 61:", "context of 256")


@pytest.mark.parametrize("place", [0, 5], ids=["trained on", "held out"])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_long_principle_is_noticed(space, place, side):
    principles = [dict(p) for p in tiny.PRINCIPLES]
    principles[place][side] = ["short", "very long " * 25]
    (space.task / "principles.json").write_text(json.dumps(principles))
    space.refused(space.task, "context of 256")


# ------------------------------------------------------------------------------------- the out_dir


def test_an_out_dir_that_is_a_file(space):
    (space.path / "file").write_text("mine")
    space.refused(f"{space.path}/file", flags=[f"--out_dir={space.path}/file"])
    assert (space.path / "file").read_text() == "mine"


def test_an_out_dir_that_holds_other_things_is_left_as_it_is(space):
    space.out.mkdir()
    (space.out / "thesis.tex").write_text("years of work")
    space.told(f"--out_dir={space.out}", "other things", "another folder")
    assert [p.name for p in space.out.iterdir()] == ["thesis.tex"]
    assert not (space.path / "out.1").exists()
    before = sorted(space.path.rglob("*"))
    for folder in (space.task, space.path / "base", space.path):  # the model's own, and above it
        space.told("--out_dir", flags=[f"--out_dir={folder}"])
    assert sorted(space.path.rglob("*")) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 7, "task_sha256": ""}'])
def test_a_sami_json_that_no_run_wrote(space, text):
    assert tiny.command(*space.flags)[0] == 0
    (space.out / "sami.json").write_text(text)
    space.told(space.out / "sami.json", "start a new one", flags=["--resume"])


def test_several_processes_take_the_gpus_where_there_are_some(monkeypatch):
    """transformers would lay the model out over these, whatever the flag says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sami, "WORLD", 2)
    with pytest.raises(sami.BadInput, match="--device=cpu: .* use --device=cuda"):
        sami.pick_device(sami.Config(device="cpu"))


def test_checks_are_made_without_assertions_too():
    """python -O leaves every assert out: no check of sami.py may be one."""
    assert not re.search(r"^ *assert ", (ROOT / "sami.py").read_text(), re.M)


def test_a_model_is_not_moved_aside_with_its_run(space):
    assert tiny.command(*space.flags)[0] == 0
    space.told("--out_dir", "name another", flags=[f"--model={space.out}/iteration-1"])
    assert (space.out / "iteration-1").is_dir() and not (space.path / "out.1").exists()


@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=["new", "resume"])
def test_an_out_dir_is_one_runs_at_a_time(space, flags):
    assert tiny.command(*space.flags)[0] == 0
    before = {p: p.read_bytes() for p in space.out.rglob("*") if p.is_file()}
    with filelock.FileLock(space.out / "lock"):  # as a run at work has it
        space.told("another run", space.out, flags=flags)
    assert {p: p.read_bytes() for p in space.out.rglob("*") if p.is_file()} == before
    assert not (space.path / "out.1").exists()
    code, _, err = tiny.command(*space.flags, *flags)
    assert code == 0, err  # that run has ended


# ---------------------------------------------------------------------------------------- failures


def test_all_samples_filtered_out(space):
    space.edit(first_must_end_with="never this")
    space.told("iteration 1", "filtered", "iteration-1.jsonl", code=1)
    lines = (space.out / "samples/iteration-1.jsonl").read_text().splitlines()
    assert len(lines) == 20, "half of the 40 queries, each with its reason"
    assert all(json.loads(line)["dropped"] for line in lines)


def test_fewer_usable_samples_than_wanted_is_no_failure(space):
    code, _, err = tiny.command(*space.flags, "--batch_size=16", "--steps=3")
    assert code == 0, err
    steps = (space.out / "log.jsonl").read_text().splitlines()
    assert len(steps) == 2, "20 queries make one step of 16 and a short one"


def test_a_loss_that_is_not_a_number(space):
    space.told("nan", "--lr", code=1, flags=["--lr=1e30", "--steps=3", "--beta=0"])
    assert not (space.out / "iteration-1").exists()


@pytest.mark.parametrize("lr", ["1e30", "1e18"])  # weights too large to square, or to multiply
@pytest.mark.parametrize("steps", [1, 2])
def test_an_explosion_at_the_last_step(space, monkeypatch, steps, lr):
    """No loss comes behind it that would tell."""
    monkeypatch.setattr(sami, "learning_rate",
                        lambda step, steps, cfg: cfg.lr if step == steps - 1 else 0)
    space.told("--lr", "step", code=1, flags=[f"--lr={lr}", f"--steps={steps}"])
    assert len((space.out / "log.jsonl").read_text().splitlines()) == steps
    assert not (space.out / "iteration-1").exists()


@pytest.mark.parametrize("flags", [
    [], ["--temperature=0"], ["--temperature=0.5", "--top_p=0.5"], ["--eval_queries=2"]], ids=str)
@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_whose_weights_are_no_numbers(space, weight, flags):
    file = space.path / "base" / "model.safetensors"
    weights = load_file(file)
    weights[weight][3] = float("nan")
    save_file(weights, file, metadata=dict(format="pt"))
    space.told("nan", code=1, flags=flags)
    assert not (space.out / "iteration-1").exists()


def test_a_gradient_that_is_not_a_number(space, monkeypatch):
    """A last step's loss may be fine and its gradient not: such weights are not saved."""
    def load(*args, real=sami.load_model):
        model = real(*args)
        model.lm_head.weight.register_hook(lambda g: g * float("nan"))
        return model

    monkeypatch.setattr(sami, "load_model", load)
    space.told("nan", "--lr", code=1)
    assert not (space.out / "iteration-1").exists()


def test_a_failure_keeps_the_iterations_that_finished(space, monkeypatch):
    loads, real = [], sami.load_model

    def load(*args):
        loads.append(model := real(*args))
        if len(loads) == 2:  # the base, read again for iteration 2
            torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        return model

    monkeypatch.setattr(sami, "load_model", load)
    space.told("nan", "--lr", code=1, flags=["--iterations=2"])
    assert sorted(p.name for p in space.out.glob("iteration-*")) == ["iteration-1"]
    assert real(space.out / "iteration-1", torch.device("cpu"), sami.Config())


def test_git_need_not_be_there(space, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, err = tiny.command(*space.flags)
    assert code == 0, err
