"""Bad input ends in one sentence that names the thing and the fix, exit code 2; a failure while running: 1."""
import json, shutil

import pytest
import torch

import sami, tiny


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
        path, task = tmp_path, tmp_path / "task"

        flags = [f"--task={tmp_path}/task", f"--model={tmp_path}/base", f"--out_dir={tmp_path}/out", "--device=cpu",
                 "--n=2", "--batch_size=4", "--max_new_tokens=8", "--eval_queries=0", "--iterations=1", "--steps=1"]

        def edit(self, **keys):
            (self.task / "task.json").write_text(json.dumps({**tiny.TASK, **keys}))

        def refused(self, *words, flags=(), code=2):
            """Exit code and one sentence that holds these words; nothing of a run is left behind by bad input."""
            got, _, err = tiny.command(*self.flags, *flags)
            assert got == code, err
            assert err.startswith("error: ") and err.count("\n") == 1, err
            for word in words:
                assert str(word) in err, f"{word!r} is not in {err!r}"
            assert code == 1 or not (tmp_path / "out").exists()
            return err

    return Space()


@pytest.mark.parametrize("flag, words", [
    ("--learning_rate=1", ["--learning_rate=1", "--help"]),
    ("--batchsize=1", ["--batchsize=1", "--help"]),
    ("lr=1", ["lr=1"]),
    ("--lr", ["--lr", "--lr=..."]),
    ("--lr=fast", ["--lr=fast", "number"]),
    ("--n=2.5", ["--n=2.5", "whole number"]),
    ("--restart=maybe", ["--restart=maybe", "True or False"]),
    ("--check=", ["--check=", "True or False"]),
    ("--offload", ["--offload and --hybrid", "several processes and --parallel=fsdp"]),
    ("--hybrid", ["--offload and --hybrid", "several processes and --parallel=fsdp"]),
    ("--parallel=tp", ["--parallel=tp", "auto, ddp, fsdp"]),
    ("--save_every=0", ["--save_every=0", "at least 1"]),
    ("--sample_gb=-1", ["--sample_gb=-1", "at least 0"]),
    ("--gpus=-1", ["--gpus=-1", "at least 0"]),
    ("--gpu_tflops=0", ["--gpu_tflops=0", "at least"]),
    ("--preset=nope", ["nope", "hh-mistral-7b"]),
    ("--optimizer=sgd", ["--optimizer=sgd", "rmsprop"]),
    ("--contrast=none", ["--contrast=none", "two-sided"]),
    ("--reduce=max", ["--reduce=max", "mean"]),
    ("--n=1", ["--n=1", "2"]),
    ("--lr=-1", ["--lr=-1"]),
    ("--lr=nan", ["--lr=nan"]),
    ("--temperature=-1", ["--temperature=-1"]),
    ("--top_p=0", ["--top_p=0"]),
    ("--top_p=1.5", ["--top_p=1.5", "1"]),
    ("--batch_size=0", ["--batch_size=0"]),
    ("--steps=two", ["--steps=two"]),
    ("--steps=2,4", ["--steps=2,4", "--iterations=1"]),
    ("--steps=0", ["--steps=0"]),
    ("--device=tpu", ["--device=tpu", "cpu"]),
])
def test_flags(space, flag, words):
    space.refused(*words, flags=[flag])


def test_flags_fail_before_anything_loads(space, monkeypatch):
    for name in ("load_task", "load_tokenizer", "load_model"):
        monkeypatch.setattr(sami, name, lambda *_: pytest.fail("this flag should have stopped the run before"))
    space.refused("--nope", flags=["--nope=1"])


def test_a_preset_gives_values_and_flags_override_them():
    cfg = sami.parse(sami.Config, ["--lr=1e-6", "--preset=tldr-mixtral-8x7b", "--restart=False"], sami.PRESETS)
    assert (cfg.lr, cfg.batch_size, cfg.n, cfg.optimizer, cfg.beta, cfg.restart) == (1e-6, 128, 2, "rmsprop", 0, False)
    for name in sami.PRESETS:
        sami.check(sami.parse(sami.Config, [f"--preset={name}"], sami.PRESETS))


def test_a_flag_that_is_true_or_false_needs_no_value():
    cfg = sami.parse(sami.Config, ["--check", "--restart=false"])
    assert cfg.check is True and cfg.restart is False and sami.Config().check is False


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        sami.parse(sami.Config, ["--help"], sami.PRESETS)
    printed = capsys.readouterr().out
    assert not stop.value.code and all(f"--{name}" in printed for name in sami.Config.__annotations__)


@pytest.mark.parametrize("name", ["task.json", "principles.json", "train.jsonl", "test.jsonl"])
def test_a_missing_file(space, name):
    (space.task / name).unlink()
    space.refused(space.task / name, "missing")


def test_a_missing_task(space):
    space.refused(f"{space.path}/nope", "task.json", flags=[f"--task={space.path}/nope"])


@pytest.mark.parametrize("line", ['{"query": "a"', "plain text", '"a string"', '{"question": "a"}', '{"query": ""}',
                                  '{"query": 7}', "[]", "7"])
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
    with open(space.task / "train.jsonl", "a") as f:
        f.write('{"query": "x", "focus": "p9"}\n')
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
    (dict(principles_per_constitution=0), ["principles_per_constitution", "0"]),
    (dict(principles_per_constitution=5), ["principles_per_constitution", "4"]),
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
])
def test_a_principle_that_is_none(space, change, words):
    principles = [dict(p) for p in tiny.PRINCIPLES]
    principles[1].update(change)
    (space.task / "principles.json").write_text(json.dumps(principles))
    space.refused(space.task / "principles.json", *words)


def test_more_constitutions_than_can_be_drawn(space):
    space.refused(space.task, "5", "4", "principles_per_constitution", flags=["--n=5"])
    with open(space.task / "train.jsonl", "a") as f:
        f.write('{"query": "x", "focus": "p2"}\n')
    space.refused(space.task, "4", "3", flags=["--n=4"])  # fewer are left where a query has a focus


def test_too_few_queries_for_two_halves(space):
    space.refused("quer", flags=["--max_queries=1", "--iterations=2"])


def test_a_folder_that_is_no_model(space, monkeypatch):
    space.refused(f"--model={space.path}/task", "config.json", flags=[f"--model={space.path}/task"])
    space.refused(f"--model={space.path}/nope", flags=[f"--model={space.path}/nope"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
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
    got, _, err = tiny.command(*space.flags)
    assert got == 2 and f"--model={space.path}/base" in err and err.count("\n") == 1, err


def test_a_prompt_longer_than_the_context(space):
    with open(space.task / "train.jsonl", "a") as f:
        f.write(json.dumps(dict(query="word " * 60)) + "\n")
    space.refused(space.task / "train.jsonl", "line 41", "256", "context")


def test_an_out_dir_that_is_a_file(space):
    (space.path / "file").write_text("")
    space.refused(f"{space.path}/file", flags=[f"--out_dir={space.path}/file"])


def test_all_samples_filtered_out(space):
    space.edit(first_must_end_with="never this")
    space.refused("iteration 1", "filtered", "iteration-1.jsonl", code=1)
    rows = [json.loads(line) for line in (space.path / "out/samples/iteration-1.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(row["dropped"] for row in rows), "half of the 40 queries, each with its reason"


def test_fewer_usable_samples_than_wanted_is_no_failure(space):
    code, _, err = tiny.command(*space.flags, "--batch_size=16", "--steps=3")
    assert code == 0, err
    steps = (space.path / "out" / "log.jsonl").read_text().splitlines()
    assert len(steps) == 2, "20 queries make one step of 16 and a short one"


def test_a_loss_that_is_not_a_number(space):
    space.refused("nan", "--lr", code=1, flags=["--lr=1e30", "--steps=3", "--beta=0"])
    assert not (space.path / "out" / "iteration-1").exists()


def test_a_gradient_that_is_not_a_number(space, monkeypatch):
    """The loss of the last step may be fine and its gradient not: such weights are not saved as an iteration."""
    def load(*args, real=sami.load_model):
        model = real(*args)
        model.lm_head.weight.register_hook(lambda g: g * float("nan"))
        return model

    monkeypatch.setattr(sami, "load_model", load)
    space.refused("nan", "--lr", code=1)
    assert not (space.path / "out" / "iteration-1").exists()


def test_a_failure_keeps_the_iterations_that_finished(space, monkeypatch):
    loads, real = [], sami.load_model

    def load(*args):
        loads.append(model := real(*args))
        if len(loads) == 2:  # the base, read again for iteration 2
            torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        return model

    monkeypatch.setattr(sami, "load_model", load)
    space.refused("nan", "--lr", code=1, flags=["--iterations=2"])
    assert sorted(p.name for p in (space.path / "out").glob("iteration-*")) == ["iteration-1"]
    assert sami.load_model(space.path / "out" / "iteration-1", torch.device("cpu"))


def test_git_need_not_be_there(space, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, err = tiny.command(*space.flags)
    assert code == 0, err
