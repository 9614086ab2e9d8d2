"""The numbers are those of an earlier, longer sami.py: same samples, log-probs, losses."""
import hashlib, json

import pytest
import torch

import sami, tiny

ROOT = sami.Path(sami.__file__).parent
PROMPTS = [  # two principles and a query
    ("Whisper it.", "Use a casual greeting.", "Tell me about the goat and the broom."),
    ("Use an excited voice.", "Greet me politely.", "Tell me about the goat and the broom."),
    ("Use a calm voice.", "Use the present tense.", "Tell me about the pear and the duck."),
    ("Say what they did.", "Use an excited voice.", "Tell me about the pear and the duck."),
    ("Choose food as the theme.", "Stay under a roof.", "Describe the clock and the frog."),
    ("Stay in the wild.", "Let them perform.", "Describe the clock and the frog."),
]
GREEDY = [
    [414, 506, 44, 662, 634, 468, 294, 758, 587, 472, 294, 661, 502, 633, 704, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
    [415, 667, 44, 662, 634, 468, 294, 758, 587, 472, 294, 661, 502, 633, 704, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
    [414, 506, 44, 662, 634, 468, 294, 758, 670, 472, 294, 661, 554, 633, 715, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
    [414, 506, 44, 662, 634, 468, 294, 758, 670, 472, 294, 661, 554, 633, 704, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
    [414, 506, 44, 662, 634, 468, 294, 758, 529, 472, 294, 661, 580, 596, 704, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
    [414, 506, 44, 662, 634, 468, 294, 758, 529, 472, 294, 661, 580, 596, 542, 370, 294, 571, 568,
     711, 603, 46, 450, 607, 294, 739, 46, 799],
]
WARM = [
    [415, 667, 44, 662, 737, 642, 294, 491, 587, 472, 294, 661, 502, 596, 704, 370, 294, 593, 568,
     756, 603, 46, 444, 339, 775, 759, 46, 799],
    [414, 506, 44, 662, 527, 468, 294, 758, 587, 472, 294, 789, 502, 702, 349, 370, 294, 571, 568,
     626, 603, 46, 444, 339, 775, 759, 46, 799],
    [414, 506, 44, 662, 737, 556, 294, 758, 670, 472, 294, 789, 554, 702, 704, 370, 294, 571, 568,
     711, 603, 46, 459, 787, 610, 751, 63, 799],
    [415, 667, 44, 662, 527, 556, 294, 491, 670, 472, 294, 789, 554, 633, 704, 370, 294, 571, 568,
     711, 603, 33, 444, 339, 775, 759, 46, 799],
    [414, 506, 44, 662, 527, 379, 294, 605, 529, 472, 294, 376, 580, 633, 360, 370, 294, 758, 529,
     633, 715, 370, 294, 593, 568, 626, 603, 46, 444, 339, 775, 759],
    [414, 506, 44, 662, 527, 468, 294, 758, 529, 472, 294, 789, 580, 633, 360, 370, 294, 571, 568,
     626, 603, 46, 450, 607, 294, 739, 46, 799],
]
MEAN = [
    [-0.538747, -0.540731, -1.582766, -1.561197],
    [-0.566643, -0.569662, -1.600157, -1.534982],
    [-1.511010, -1.444964, -0.595495, -0.576645],
    [-1.504877, -1.503925, -0.587990, -0.524324],
]
SUM = [
    [-14.546166, -14.599734, -42.734673, -42.152328],
    [-15.299374, -15.380882, -43.204239, -41.444504],
    [-40.797279, -39.014030, -16.078363, -15.569411],
    [-40.631683, -40.605976, -15.875718, -14.156760],
]
LOSS = {"two-sided": 1.010011, "constitutions": 1.009906, "responses": 1.010117}
INFONCE = 0.745920
# of one run of four steps: [number, ids] of every line of its samples file, and the losses
SAMPLED = "afb99587a26d3641fc53814dd95a1da74ef36596f13ac0c5788d1649c4e361a2"
LOSSES = [1.379578, 1.376664, 1.378665, 1.371283]


@pytest.fixture(scope="module")
def toy():
    """-> model, ids of its prompts, ids that end a text."""
    base = str(ROOT / "data/toy/base")
    _, tokenizer = sami.load_tokenizer(base)
    model = sami.load_model(base, torch.device("cpu"), sami.Config(device="cpu"))
    text = "Principles:\n1. {}\n2. {}\nTask: {}\nAnswer:"
    prompts = [sami.encode(tokenizer, text.format(*p))[0] for p in PROMPTS]
    return model, prompts, sami.end_ids(model, tokenizer)


@pytest.mark.parametrize("temperature, wanted", [(0, GREEDY), (0.8, WARM)])
def test_the_same_ids_are_sampled(toy, temperature, wanted):
    model, prompts, ends = toy
    assert wanted == sami.sample(model, prompts, max_new_tokens=32, temperature=temperature,
                                 eos_ids=ends, seed=1)


def test_the_same_log_probs_losses_and_information(toy):
    model, prompts, ends = toy
    responses = [y[:-1] if y[-1] in ends else y for y in WARM][:4]
    with torch.no_grad():
        found = {how: sami.logp_matrix(model, prompts[:4], responses, how)
                 for how in ("mean", "sum")}
    for how, wanted in dict(mean=MEAN, sum=SUM).items():
        assert torch.allclose(found[how], torch.tensor(wanted), rtol=1e-6, atol=1e-5), how
    for contrast, wanted in LOSS.items():
        assert float(sami.sami_loss(found["mean"], contrast)) == pytest.approx(wanted, abs=1e-5)
    assert float(sami.infonce(found["sum"])) == pytest.approx(INFONCE, abs=1e-5)


def test_a_run_samples_and_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = tiny.command(
        "--task=data/toy", "--model=data/toy/base", f"--out_dir={tmp_path}/out", "--device=cpu",
        "--iterations=1", "--steps=4", "--batch_size=16", "--n=4", "--lr=3e-4", "--grad_clip=0",
        "--beta=0.1", "--temperature=0.8", "--max_new_tokens=32", "--eval_queries=0", "--seed=1")
    assert code == 0, out + err
    read = lambda name: [json.loads(line) for line in open(tmp_path / "out" / name)]
    ids = [[row["number"], row["ids"]] for row in read("samples/iteration-1.jsonl")]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == SAMPLED
    assert [row["loss"] for row in read("log.jsonl")] == pytest.approx(LOSSES, rel=0, abs=1e-5)
