"""What the README says is true: its commands (those marked CPU run), flags, links, task, forks."""
import json, os, re, shlex, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

import evaluate, generate, plan, sami, tiny

ROOT = sami.Path(sami.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.M | re.S)
CONFIGS = {"sami.py": sami.Config, "evaluate.py": evaluate.Config, "generate.py": generate.Config,
           "tests/plan.py": plan.Config}


def commands(block):
    """The words of each command in a block: one a line, or several with && between."""
    return [shlex.split(part, comments=True) for line in block.splitlines()
            for part in line.split("&&")]


def write_recipes(folder):
    """The README's task, into data/ of `folder`: a copied task, with the files that are shown."""
    source, target = re.search(r"`cp -r (\S+) (\S+)`", TEXT).groups()
    shutil.copytree(ROOT / source, folder / target)
    shown = dict(re.findall(rf"`({target}/[\w.]+)`[^\n]*\n(?:[^\n]+\n)*\n```\w+\n(.*?)^```", TEXT,
                            re.M | re.S))
    names = ["/task.json", "/principles.json", "/train.jsonl", "/rules.py"]
    assert [name[len(target):] for name in shown] == names
    shown[f"{target}/test.jsonl"] = ('{"query": "What is for lunch?"}\n'
                                     '{"query": "What goes with bread?"}\n')
    for name, text in shown.items():
        (folder / name).write_text(text)


def without_torchruns_own(words):
    """torchrun --nproc_per_node=8 -- sami.py --n=4: what is before the script is not for it."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert script == 1 or words[0] == "torchrun"
    # torchrun reads --n=4 as the start of a name of its own, unless it stands behind --
    assert words[0] == "python" or "--" in words or not any(w.startswith("--n=") for w in words)
    return [words[0], *words[script:]]


PYTHON = [without_torchruns_own(words) for block in BLOCKS if "import sami" not in block
          for words in commands(block) if words and words[0] in ("python", "torchrun")]


def test_there_are_commands_to_check():
    scripts = {"sami.py", "evaluate.py", "generate.py", "tests/plan.py"}
    assert scripts <= {words[1] for words in PYTHON}


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_a_command_names_files_and_flags_that_exist(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *flags = words[1:]
    assert (ROOT / script).is_file()
    if script not in CONFIGS:
        source = (ROOT / script).read_text() + (ROOT / "data/tldr/sources.py").read_text()
        assert all(f'"{flag.partition("=")[0]}"' in source for flag in flags)
    else:
        cfg = sami.parse(CONFIGS[script], flags)
        made = re.findall(r"`cp -r \S+ (\S+)`", TEXT)
        assert getattr(cfg, "task", "") in ("", *made, *(f"data/{p.name}"
                                                         for p in (ROOT / "data").iterdir()))


def test_every_flag_in_the_text_exists():
    known = {name for config in CONFIGS.values() for name in config.__annotations__}
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)):
        ours = re.sub(r"torchrun .*?(?=\S+\.py)", "", code)  # torchrun has flags of its own
        assert set(re.findall(r"--(\w+)", ours)) <= known, code
        for script in re.findall(r"(?:python|torchrun) (?:-\S+ )*(\S+)", code):
            assert (ROOT / script).is_file(), code


def test_the_papers_presets_are_all_listed():
    paper = (ROOT / "data/PAPER.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(data/\S+\.json)`", paper, re.M))
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "data").glob("*/*.json")
             if "lr" in json.loads(p.read_text())}
    assert listed == there - {"data/stories/tinystories-33m.json", "data/manners/smollm2.json"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_a_link_or_picture_leads_somewhere(target):
    assert target.startswith("https://") or (ROOT / target.partition("#")[0]).exists()


def test_the_functions_that_a_fork_replaces_are_there():
    [table] = re.findall(r"\| to change \|.*?\n\n", TEXT, re.S)
    names = re.findall(r"`(\w+)\(", table)
    assert {"objective", "sample", "learning_rate", "log", "load_model", "save_model"} <= {*names}
    assert all(callable(getattr(sami, name)) for name in names)


def test_the_fork_of_the_readme_runs(tmp_path):
    [fork] = [block for block in BLOCKS if "sami.run" in block]
    (tmp_path / "dpo.py").write_text(fork)
    flags = [*tiny.folder(tmp_path), "--steps=4"]
    done = subprocess.run([sys.executable, tmp_path / "dpo.py", *flags], text=True,
                          capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6), "the base against itself: log 2"
    assert rows[0]["lr"] > rows[1]["lr"] > rows[2]["lr"] > rows[3]["lr"] > 0


def test_two_commands_are_all_a_newcomer_needs():
    """The first block is: install, train, look. No flag, no download of a model, and the tests."""
    run, tests = BLOCKS[0].splitlines()
    install = ["pip", "install", "-r", "requirements.txt"]
    assert commands(run) == [install, ["torchrun", "sami.py"], ["python", "evaluate.py"]]
    assert commands(tests) == [install, ["pytest"]]
    cfg = sami.Config()
    assert all((ROOT / path).is_dir() for path in (cfg.task, cfg.model))
    assert cfg.out_dir == evaluate.Config().out_dir


SHORT = {"sami.py": "--iterations=1 --steps=1 --batch_size=2 --eval_queries=2 --max_new_tokens=4",
         "evaluate.py": "--queries=4 --max_new_tokens=4", "generate.py": ""}


def test_what_is_marked_cpu_runs_on_a_cpu(tmp_path):
    """In a copy of the repository, each command with its size made small; blocks side by side."""
    hidden = shutil.ignore_patterns(".*", "__pycache__", "out*", "official", "download")
    for name in SHORT:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=hidden)
    write_recipes(tmp_path)
    starts = dict(python=[sys.executable],
                  torchrun=[sys.executable, "-m", "torch.distributed.run", "--standalone"])
    marked = [[words for line in block.splitlines() if "# CPU" in line for words in commands(line)
               if words[0] in starts] for block in BLOCKS]
    blocks = [block for block in marked if block]
    assert [len(block) for block in blocks] == [2, 3], "the first, and that of one's own task"

    def run(block):
        for program, script, *flags in block:
            command = [*starts[program], script, *flags, *SHORT[script].split()]
            done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True,
                                  env=dict(os.environ, OMP_NUM_THREADS="1"))
            assert done.returncode == 0, (script, flags, done.stdout, done.stderr)
            yield done.stdout

    with ThreadPoolExecutor(2) as pool:
        (run1, look1), (shown, run2, look2) = pool.map(list, map(run, blocks))
    assert "c_1:" in shown and "done in" in run1 and "done in" in run2
    for out, look in (("out", look1), ("out-recipes", look2)):
        results = json.loads((tmp_path / out / "results.json").read_text())
        adherence = results["models"]["iteration-1"]["adherence"]
        assert results["judge"] == "rules" and 0 <= adherence <= 1
        assert "adherence" in look and (tmp_path / out / "report.md").is_file()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The README's task without rules, a tiny model, and what a short run on them leaves."""
    path = tmp_path_factory.mktemp("own")
    write_recipes(path)
    (path / "data/recipes/rules.py").unlink()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/toy/base")  # of bytes at the least
    model = tiny.model(vocab_size=len(tokenizer), max_position_embeddings=2048,
                       eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path / "base"), tokenizer.save_pretrained(path / "base")
    code, _, err = tiny.command(
        f"--task={path}/data/recipes", f"--model={path}/base", f"--out_dir={path}/out", "--n=2",
        "--iterations=1", "--steps=1", "--batch_size=2", "--max_new_tokens=8", "--device=cpu",
        "--eval_queries=2")
    assert code == 0, err
    return path


def test_a_task_of_ones_own_needs_no_code(own):
    rows = [json.loads(line) for line in open(own / "out/samples/iteration-1.jsonl")]
    assert rows and all(row["query"][-1] in "?." and "POST" not in row["query"] for row in rows)
    said = {"Use cheap food.", "Use costly food.", "Be done in ten minutes.", "Take all day."}
    read = {line[3:] for row in rows for c in row["constitutions"] for line in c.splitlines()}
    assert read <= said
    assert (own / "out/iteration-1/model.safetensors").is_file()


@pytest.mark.parametrize("models", [False, True])
def test_and_a_model_judges_it(own, models, capsys, monkeypatch):
    out = own / "compared" if models else own / "out"
    flags = [f"--models=base={own}/base,mine={own}/out/iteration-1", f"--task={own}/data/recipes",
             "--max_new_tokens=8", "--sample_batch=8"] if models else []
    evaluate.main([f"--out_dir={out}", f"--judge=model:{own}/base", "--queries=2", "--device=cpu",
                   *flags])
    results = json.loads((out / "results.json").read_text())
    mine = results["models"]["mine" if models else "iteration-1"]
    assert results["task"] == f"{own}/data/recipes" and 0 <= mine["win_rate"] <= 1
    assert mine["adherence"] is None
    assert "win rate" in capsys.readouterr().out and (out / "report.md").is_file()


def test_without_rules_the_default_judge_says_what_to_do(own):
    with pytest.raises(sami.BadInput, match="--judge=model"):
        evaluate.main([f"--out_dir={own}/out"])
