"""Lesson: a query file is whole or untouched, holds each query once, and no test query is ever
trained on.

Every test runs the real prepare.py in a copy of data/, on tiny files, without a network.
"""
import gzip
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def data(tmp_path):
    for task in ("hh", "tldr", "principles", "manners"):
        ignored = shutil.ignore_patterns("download", "official", "__pycache__")
        shutil.copytree(DATA / task, tmp_path / "data" / task, ignore=ignored)
    for task in ("hh", "tldr"):
        for name in ("train", "test"):  # whatever the checkout holds by now
            put(tmp_path / "data" / task / f"{name}.jsonl", [{"query": f"an old {name} query"}])
    return tmp_path / "data"


def prepare(data, task, *flags):
    """(exit code, what it printed); an error is one line, never a traceback."""
    done = subprocess.run([sys.executable, data / task / "prepare.py", *flags],
                          capture_output=True, text=True, timeout=60,
                          env={**os.environ, "no_proxy": "127.0.0.1"})
    if done.returncode:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stdout + done.stderr


def put(path, rows, pack=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if pack else text)
    return str(path)


def queries(path):
    return [json.loads(line)["query"] for line in path.read_text().splitlines()]


def dialogue(first):
    return {"chosen": f"\n\nHuman: {first}\n\nAssistant: Yes."
                      "\n\nHuman: And then?\n\nAssistant: No.",
            "rejected": ""}


def comparison(i, post, split="train"):
    return {"info": {"id": f"t3_{i}", "post": post, "title": "T"}, "split": split, "summaries": []}


# ------------------------------------------------------------------------------------------- counts


def test_hh_takes_first_turns_once_and_in_turn(data, tmp_path):
    sources = ",".join([
        put(tmp_path / "helpful-train.jsonl.gz",
            map(dialogue, ["How?", "how? ", "Why?", "Held?", "When?"]), pack=True),
        put(tmp_path / "harmless-base" / "train.jsonl", map(dialogue, ["Bad one", "Bad two"])),
        put(tmp_path / "helpful-test.jsonl.gz", map(dialogue, ["held?", "New?"]), pack=True)])
    # plain first prompts work as well
    (tmp_path / "harmless_valid.json").write_text(json.dumps(["Bad three"]))
    code, out = prepare(data, "hh", f"--source={sources},{tmp_path / 'harmless_valid.json'}")
    assert code == 0, out
    train = [json.loads(line) for line in (data / "hh" / "train.jsonl").read_text().splitlines()]
    # "how?" repeats "How?"; "Held?" is a test query
    assert [(r["query"], r["focus"]) for r in train] == [
        ("How?", "helpful"), ("Bad one", "harmless"), ("Bad two", "harmless"), ("Why?", "helpful"),
        ("When?", "helpful")]
    assert queries(data / "hh" / "test.jsonl") == ["held?", "Bad three", "New?"]
    assert "1 left out of train" in out


def test_manners_takes_short_first_turns_of_one_line(data, tmp_path):
    train = [f"How do I do thing {i}?" for i in range(1010)]
    train[3:3] = ["Why?", "What is\nthis long?", "x" * 91, "how do i do thing 0?",
                  "Held out, is it?"]
    test = ["held out,  is it?", *(f"Is it test number {i}?" for i in range(260))]
    sources = ",".join([
        put(tmp_path / "helpful-train.jsonl.gz", map(dialogue, train), pack=True),
        put(tmp_path / "helpful-base" / "test.jsonl", map(dialogue, test)),
        put(tmp_path / "harmless-test.jsonl", map(dialogue, ["What is so bad?", "No", *test]))])
    code, out = prepare(data, "manners", f"--source={sources}")
    assert code == 0, out
    # a test query counts as another one in another case or spacing
    assert queries(data / "manners/train.jsonl") == [f"How do I do thing {i}?" for i in range(1000)]
    assert queries(data / "manners/test.jsonl") == test[:250]
    others = queries(data / "manners/harmless.jsonl")
    assert others == ["What is so bad?", *test[250:]]
    before = (data / "manners/train.jsonl").read_bytes()
    put(tmp_path / "neither.jsonl", map(dialogue, train))
    code, out = prepare(data, "manners", f"--source={tmp_path}/neither.jsonl")
    assert code == 2 and "helpful or harmless" in out
    assert (data / "manners/train.jsonl").read_bytes() == before


def test_tldr_keeps_each_post_id_once(data, tmp_path):
    rows = [comparison(1, "one"), comparison(1, "one"), comparison(2, "two "),
            comparison(3, "three", "valid1"), comparison(4, "four", "valid2"),
            comparison(5, "THREE"),  # a test post with another id
            {"info": {"id": "n", "article": "news"}, "split": "valid1"}]
    code, out = prepare(data, "tldr", "--source=" + put(tmp_path / "batch3.json", rows))
    assert code == 0, out
    assert queries(data / "tldr" / "train.jsonl") == ["one", "two"]
    assert queries(data / "tldr" / "test.jsonl") == ["three", "four"]


def test_a_side_without_a_source_keeps_its_queries(data, tmp_path):
    source = put(tmp_path / "validation.jsonl", [{"post": "one"}])
    code, out = prepare(data, "tldr", "--source=" + source)
    assert code == 0 and "train.jsonl keeps" in out
    assert queries(data / "tldr" / "train.jsonl") == ["an old train query"]
    assert queries(data / "tldr" / "test.jsonl") == ["one"]


def test_the_queries_that_are_shipped_never_overlap():
    for task in ("hh", "tldr", "manners"):
        train, test = (queries(DATA / task / f"{name}.jsonl") for name in ("train", "test"))
        assert len(train) >= 16 and len(test) >= 8 and not set(train) & set(test)
    for line in (DATA / "hh" / "train.jsonl").read_text().splitlines():
        assert json.loads(line)["focus"] in ("helpful", "harmless")


# -------------------------------------------------------------------------------------- wrong input


def unchanged(data):
    for task in ("hh", "tldr"):
        assert queries(data / task / "train.jsonl") == ["an old train query"]
        assert not list((data / task).rglob("*.tmp"))


@pytest.mark.parametrize("name, content, says", [
    ("helpful.jsonl.gz", gzip.compress(json.dumps(dialogue("x")).encode())[:60],
     "line 1: the gzip ends"),
    ("helpful.jsonl.gz", b"not gzip at all", "line 1: the gzip ends or breaks here"),
    ("helpful.jsonl", b'{"chosen": "\\n\\nHuman: a"}\n{"prompt": "b"}\n',
     'line 2 has no "chosen" dialogue'),
    ("helpful.jsonl", b'{"chosen": "Hello"}\n', 'line 1 has no "chosen" dialogue'),
    ("helpful.jsonl", b'{"chosen": "\\n\\nHuman: a"}\n{"chosen": "\\n\\nHum',
     "line 2: not valid JSON"),
    ("helpful.jsonl", b"\xff\xfe", "line 1: not UTF-8 text"),
    ("helpful.jsonl", b"", "is empty"),
    ("helpful.jsonl", b"\n\n", "no queries"),
    ("neither.jsonl", b"[]", "helpful or harmless"),
])
def test_wrong_files_are_named_and_change_nothing(data, tmp_path, name, content, says):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(content)
    code, out = prepare(data, "hh", f"--source={path}")
    assert code == 2 and says in out and str(path) in out or says == "no queries", out
    unchanged(data)


def test_other_wrong_input(data, tmp_path):
    rows = [comparison(1, "one"), {"info": {"text": "x"}}]
    code, out = prepare(data, "tldr", "--source=" + put(tmp_path / "a.jsonl", rows))
    assert code == 2 and 'a.jsonl line 2 has no "post" text' in out
    code, out = prepare(data, "tldr", "--source=/nowhere.jsonl")
    assert code == 2 and "/nowhere.jsonl does not exist" in out
    train, test = (put(tmp_path / f"{name}.jsonl", [{"post": "one"}]) for name in ("train", "test"))
    code, out = prepare(data, "tldr", f"--source={train},{test}")
    assert code == 2 and "every train query is a test query" in out
    code, out = prepare(data, "principles")
    assert code == 2 and "data/tldr/prepare.py" in out
    unchanged(data)


# ---------------------------------------------------------------------------------------- downloads


def test_downloads_come_from_base_url(data, tmp_path):
    names = ["helpful-base/train", "helpful-base/test", "harmless-base/train", "harmless-base/test"]
    for i, name in enumerate(names):
        put(tmp_path / "hub" / f"{name}.jsonl.gz", [dialogue(f"query {i}")], pack=True)
    code, out = prepare(data, "hh", f"--base_url=file://{tmp_path}/hub")
    assert code == 0 and out.count("sha256") == 4, out
    assert queries(data / "hh" / "train.jsonl") == ["query 0", "query 2"]
    assert queries(data / "hh" / "test.jsonl") == ["query 1", "query 3"]


def test_a_failed_download_changes_nothing(data, tmp_path):
    for task in ("hh", "tldr"):
        for flags in ([], ["--official"]):
            code, out = prepare(data, task, f"--base_url=file://{tmp_path}/nowhere", *flags)
            assert code == 1 and "nowhere" in out and "run the same command again" in out
    unchanged(data)


def test_a_broken_download_is_resumed(data, tmp_path):
    body, asked = gzip.compress((json.dumps(dialogue("over the wire")) + "\n").encode()), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            # the first answer breaks off
            self.wfile.write(body[start:30] if len(asked) == 1 else body[start:])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"--base_url=http://127.0.0.1:{server.server_port}"
        code, out = prepare(data, "hh", url)
        assert code == 1 and "the connection ended early" in out
        unchanged(data)
        code, out = prepare(data, "hh", url)
        server.shutdown()
    assert asked[:2] == [0, 30]  # the second call asks for the rest only
    part = data / "hh" / "download" / "helpful-base" / "train.jsonl.gz"
    assert part.read_bytes() == body and not list(data.rglob("*.part"))
    # this server has one file for all four names
    assert code == 2 and "every train query is a test query" in out


# ----------------------------------------------------------------------------------------- official


def test_official_makes_task_folders(data, tmp_path):
    site, own = tmp_path / "site", json.loads((data / "tldr" / "task.json").read_text())
    sides = {"positive": "1. Be good. \n2. Be kind.", "negative": "1. Be bad.\n2. Be cruel.",
             "identifiers": {"positive": ["pos good", "pos kind"],
                             "negative": ["neg good", "neg kind"]}}
    for writer in ("mistral", "opus"):
        put(site / f"constitutions_{writer}" / "2.json", [sides])
    (site / "prompts.py").write_text(  # the file is read, not run
        'import no_such_module\n'
        'PROMPT_GENERATION = """E\n{constitution}\n{question}\nSummary: The post"""\n'
        'PROMPT_TRAINING = "{constitution}\\n{question}\\nSummary:"\nOTHER = {}\n')
    code, out = prepare(data, "tldr", "--official", f"--base_url=file://{site}")
    assert code == 0 and "prompts.py" in out, out
    folder = data / "tldr" / "official" / "opus"
    task = json.loads((folder / "task.json").read_text())
    assert task["sampling_prompt"] == "E\n{constitution}\nPOST: {query}\nSummary:"
    assert task["response_prefix"] == " The post"
    for key in ("stop", "others"):
        assert task[key] == own[key]
    assert queries(folder / task["train"]) == ["an old train query"]
    assert json.loads((folder / "principles.json").read_text()) == [
        {"name": "good", "positive": "Be good.", "negative": "Be bad.", "heldout": False},
        {"name": "kind", "positive": "Be kind.", "negative": "Be cruel.", "heldout": False}]


def test_official_hh_and_principles(data, tmp_path):
    site = tmp_path / "site"
    put(site / "constitutions_opus_diverse" / "constitutions.json",
        [{f"p{i}": {"definition": f"Do {i}.", "antithesis": f"Do not do {i}."} for i in range(20)}])
    sides = ("HELPFUL", "HARMLESS", "NOT_HELPFUL", "NOT_HARMLESS")
    prompts = ("TRAINING", "GENERATION_ITERATION_0", "GENERATION_ITERATION_0_COT")
    (site / "prompts.py").write_text("".join(
        [f"{name}_PRINCIPLE = 'be {name}'\n" for name in sides]
        + [f"PROMPT_{name} = '{name} {{constitution}} {{question}}'\n" for name in prompts]))
    for task in ("hh", "principles"):
        code, out = prepare(data, task, "--official", f"--base_url=file://{site}")
        assert code == 0, out
    hh, diverse = (json.loads((data / t / "official" / "principles.json").read_text())
                   for t in ("hh", "principles"))
    assert [(p["name"], p["negative"]) for p in hh] == [
        ("helpful", "be NOT_HELPFUL"), ("harmless", "be NOT_HARMLESS")]
    assert [p["heldout"] for p in diverse] == [False] * 15 + [True] * 5
    cot = json.loads((data / "principles" / "official" / "task-cot.json").read_text())
    assert cot["sampling_prompt"] == "GENERATION_ITERATION_0_COT {constitution} POST: {query}"
    assert cot["answer_after"] == "Summary:"
    posts = data / "principles" / "official" / cot["train"]
    assert posts.resolve() == (data / "tldr" / "train.jsonl").resolve()


def test_what_is_not_the_authors_is_refused(data, tmp_path):
    (tmp_path / "prompts.py").write_text("<html>not found</html>")
    code, out = prepare(data, "hh", "--official", f"--base_url=file://{tmp_path}")
    assert code == 2 and "are not the authors'" in out
