"""A response is made once: generate.py goes on where it stopped, and takes from a model only what has the form."""
import json
from pathlib import Path

import pytest

import generate, sami


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("text, wanted", [
    (" Write short sentences.\n- Write long sentences.\nName: x", ("Write short sentences.", "Write long sentences.")),
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
        generate.main([*toy_flags, f"--out={tmp_path}/p.json", "--write_principles=answer questions: brief"])
    with pytest.raises(sami.BadInput, match="name, name"):
        generate.main([*toy_flags, "--write_principles=answer questions"])


@pytest.fixture
def toy_flags():
    toy = Path(__file__).parent.parent / "data" / "toy"
    return [f"--task={toy}", f"--model={toy / 'base'}", "--device=cpu"]
