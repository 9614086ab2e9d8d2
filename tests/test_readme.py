"""What the README says is true: its commands (those marked CPU are run), flags, links, counts, tables, its own task."""
import ast, json, os, re, shlex, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

import evaluate, generate, sami, tiny

ROOT = sami.Path(sami.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.M | re.S)
CONFIGS = {"sami.py": sami.Config, "evaluate.py": evaluate.Config, "generate.py": generate.Config}


def commands(block):
    """The words of each command in a block: one a line, or several with && between."""
    return [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split("&&")]


def write_recipes(folder):
    """The README's task, into data/ of `folder`: a copied task, with the files that the README shows in it."""
    source, target = re.search(r"`cp -r (\S+) (\S+)`", TEXT).groups()
    shutil.copytree(ROOT / source, folder / target)
    shown = dict(re.findall(rf"`({target}/[\w.]+)`[^\n]*\n(?:[^\n]+\n)*\n```\w+\n(.*?)^```", TEXT, re.M | re.S))
    assert [name[len(target):] for name in shown] == ["/task.json", "/principles.json", "/train.jsonl", "/rules.py"]
    shown[f"{target}/test.jsonl"] = '{"query": "What is for lunch?"}\n{"query": "What goes with bread?"}\n'
    for name, text in shown.items():
        (folder / name).write_text(text)


def without_torchruns_own(words):
    """torchrun --nproc_per_node=8 -- sami.py --n=4: what is before the script is not for it."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert script == 1 or words[0] == "torchrun"
    # torchrun reads --n=4 as the start of a name of its own, unless it stands behind --
    assert words[0] == "python" or "--" in words or not any(word.startswith("--n=") for word in words)
    return [words[0], *words[script:]]


PYTHON = [without_torchruns_own(words) for block in BLOCKS for words in commands(block)
          if words and words[0] in ("python", "torchrun")]


def test_there_are_commands_to_check():
    assert {"sami.py", "evaluate.py", "generate.py", "data/tldr/prepare.py"} <= {words[1] for words in PYTHON}


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_a_command_names_files_and_flags_that_exist(words):
    script, *flags = words[1:]
    assert (ROOT / script).is_file()
    if script not in CONFIGS:
        assert all(f'"{flag.partition("=")[0]}"' in source_of(script) for flag in flags)
    elif flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            sami.parse(CONFIGS[script], flags)
    else:
        cfg = sami.parse(CONFIGS[script], flags, sami.PRESETS)
        made = re.findall(r"`cp -r \S+ (\S+)`", TEXT)
        assert getattr(cfg, "task", "") in ("", *made, *(f"data/{p.name}" for p in (ROOT / "data").iterdir()))
        assert script != "sami.py" or sami.check(cfg)


def source_of(script):
    """A prepare.py, and what it shares with the others."""
    return (ROOT / script).read_text() + (ROOT / "data/tldr/sources.py").read_text()


def test_every_flag_in_the_text_exists():
    known = {name for config in CONFIGS.values() for name in config.__annotations__} | {"help", "official", "only"}
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)):
        assert set(re.findall(r"--(\w+)", code)) <= known, code
        for script in re.findall(r"(?:python|torchrun) (\S+)", code):
            assert (ROOT / script).is_file(), code


def test_the_papers_presets_are_all_listed():
    listed = set(re.findall(r"^\| `(\w+-[\w-]+)` \|", TEXT, re.M))
    assert listed == {name for name, values in sami.PRESETS.items() if values.items() >= {("lr", 5e-7)}}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_a_link_or_picture_leads_somewhere(target):
    assert target.startswith("https://") or (ROOT / target.partition("#")[0]).exists()


def code_lines(text):
    """Lines that are neither empty nor comment nor docstring."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    told = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
    skip = {i for doc in told for i in range(doc.lineno, doc.end_lineno + 1)}
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in skip
               for i, line in enumerate(text.splitlines(), 1))


def test_code_lines_are_counted_like_this():
    assert code_lines('"""A\nB"""\n\nimport x  # why\n# what\n\n\ndef f():\n    """C"""\n    return x\n') == 3


def test_the_stated_line_counts_are_right_within_5_percent():
    """A cell is a count of lines, of code in brackets; "958 (700)"."""
    for name, cell in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|.*\|([^|]*)\|$", TEXT, re.M):
        source = (ROOT / name).read_text(encoding="utf-8")
        for said, real in zip(re.findall(r"\d+", cell), (len(source.splitlines()), code_lines(source))):
            assert abs(int(said) - real) <= 0.05 * real, f"{name} has {real} lines, not {said}"


def test_the_algorithm_is_as_long_as_stated():
    said = int(re.search(r"\(the algorithm: (\d+) lines of code\)", TEXT)[1])
    sections = re.split(r"^# -+ (.*)$", (ROOT / "sami.py").read_text(encoding="utf-8"), flags=re.M)
    sections = dict(zip(sections[1::2], sections[2::2]))
    real = sum(code_lines(sections[name]) for name in ("sampling", "the objective", "the update"))
    assert abs(said - real) <= 0.05 * real, real


def test_two_commands_are_all_a_newcomer_needs():
    """The first block is: install, train, look. No flag, no download of a model, and the tests."""
    run, tests = BLOCKS[0].splitlines()
    assert commands(run) == [["pip", "install", "-r", "requirements.txt"], ["torchrun", "sami.py"],
                             ["python", "evaluate.py"]]
    assert commands(tests) == [["pip", "install", "-r", "requirements.txt"], ["pytest"]]
    cfg = sami.Config()
    assert all((ROOT / path).is_dir() for path in (cfg.task, cfg.model)) and cfg.out_dir == evaluate.Config().out_dir


SHORT = {"sami.py": "--iterations=1 --steps=1 --batch_size=2 --eval_queries=2 --max_new_tokens=4".split(),
         "evaluate.py": "--queries=4 --max_new_tokens=4".split()}


def test_what_is_marked_cpu_runs_on_a_cpu(tmp_path):
    """In a copy of the repository, each command with its size made small; blocks side by side."""
    hidden = shutil.ignore_patterns(".*", "__pycache__", "out*", "official", "download")
    for name in ("sami.py", "evaluate.py", "generate.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=hidden)
    write_recipes(tmp_path)
    starts = dict(python=[sys.executable], torchrun=[sys.executable, "-m", "torch.distributed.run", "--standalone"])
    marked = [[words for line in block.splitlines() if "# CPU" in line for words in commands(line)
               if words[0] in starts] for block in BLOCKS]
    assert [len(block) for block in marked if block] == [2, 3], "the first block, and that of a task of one's own"

    def run(block):
        for program, script, *flags in block:
            done = subprocess.run([*starts[program], script, *flags, *SHORT[script]], cwd=tmp_path, text=True,
                                  capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
            assert done.returncode == 0, (script, flags, done.stdout, done.stderr)
            yield done.stdout

    with ThreadPoolExecutor(2) as pool:
        (run1, look1), (checked, run2, look2) = pool.map(list, map(run, filter(None, marked)))
    assert "--- a run samples for" in checked and "done in" in run1 and "done in" in run2
    for out, look in (("out", look1), ("out-recipes", look2)):
        results = json.loads((tmp_path / out / "results.json").read_text())
        assert results["judge"] == "rules" and 0 <= results["models"]["iteration-1"]["adherence"] <= 1
        assert "adherence" in look and (tmp_path / out / "report.md").is_file()


def shown(value):
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def test_the_table_of_the_papers_settings_tells_what_a_preset_sets():
    rows = dict(re.findall(r"^\| `(\w+)`.*\|([^|]*)\|$", TEXT, re.M))  # setting: what it is here
    for name in (name for name, values in sami.PRESETS.items() if values.get("lr") == 5e-7):
        assert {*sami.PRESETS[name]} <= {*rows, "task", "model"}
        cfg = sami.parse(sami.Config, [f"--preset={name}"], sami.PRESETS)
        assert cfg.model.split("/")[1] in re.search(rf"^\| `{name}` \|.*$", TEXT, re.M).group()
        for key in rows.keys() & sami.Config.__annotations__.keys():
            assert shown(getattr(cfg, key)) in rows[key], (name, key)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The README's task without rules, a tiny model, and what a short run on them leaves."""
    path = tmp_path_factory.mktemp("own")
    write_recipes(path)
    (path / "data/recipes/rules.py").unlink()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/toy/base")  # of bytes at the least, so it reads anything
    model = tiny.model(vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path / "base"), tokenizer.save_pretrained(path / "base")
    code, _, err = tiny.command(f"--task={path}/data/recipes", f"--model={path}/base", f"--out_dir={path}/out", "--n=2",
                                "--iterations=1", "--steps=1", "--batch_size=2", "--max_new_tokens=8", "--device=cpu",
                                "--eval_queries=2")
    assert code == 0, err
    return path


def test_a_task_of_ones_own_needs_no_code(own):
    rows = [json.loads(line) for line in open(own / "out/samples/iteration-1.jsonl")]
    assert rows and all(row["query"][-1] in "?." and "POST" not in row["query"] for row in rows)
    said = {"Use cheap food.", "Use costly food.", "Be done in ten minutes.", "Take all day."}
    assert {line[3:] for row in rows for c in row["constitutions"] for line in c.splitlines()} <= said
    assert (own / "out/iteration-1/model.safetensors").is_file()


@pytest.mark.parametrize("models", [False, True])
def test_and_a_model_judges_it(own, models, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "picture", lambda *_: None)  # slow, and looked at elsewhere
    out = own / "compared" if models else own / "out"
    flags = [f"--models=base={own}/base,mine={own}/out/iteration-1", f"--task={own}/data/recipes", "--max_new_tokens=8",
             "--sample_gb=0.1"] if models else []
    evaluate.main([f"--out_dir={out}", f"--judge=model:{own}/base", "--queries=2", "--device=cpu", *flags])
    results = json.loads((out / "results.json").read_text())
    mine = results["models"]["mine" if models else "iteration-1"]
    assert results["task"] == f"{own}/data/recipes" and 0 <= mine["win_rate"] <= 1 and mine["adherence"] is None
    assert "win rate" in capsys.readouterr().out and (out / "report.md").is_file()


def test_without_rules_the_default_judge_says_what_to_do(own):
    with pytest.raises(sami.BadInput, match="--judge=model"):
        evaluate.main([f"--out_dir={own}/out"])
