"""A run that is killed, stopped, out of disk space or damaged goes on to the very weights of one that was not."""
import hashlib, json, os, random, re, resource, shutil, signal, socket, sys, threading, time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sami, tiny
from test_parallel import launch

RUN = ["--iterations=2", "--steps=2,3", "--eval_queries=2", "--save_every=1", "--temperature=0.5"]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(flags, world=1, largest_file=None, unreadable=False):
    """`sami.py flags` in `world` forked processes -> their ids. What they say goes to a file beside out_dir."""
    port, children = free_port(), []
    said = Path(next(f for f in flags if f.startswith("--out_dir=")).partition("=")[2]).parent / "said"
    for rank in range(world):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 99
        signal.alarm(120)  # ends it: a test may fail but not hang
        try:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
            sami.tqdm.set_lock(threading.RLock())  # not the one that all forks share: who is killed may hold it
            sami.RANK, sami.WORLD, sami.NODE, sys.argv = rank, world, world, ["sami.py", *flags]
            sys.stdout = sys.stderr = open(said, "a", buffering=1)
            if largest_file:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            if unreadable and rank == world - 1:
                hashlib.file_digest = broken
            sami.run(sami.main)
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            os._exit(code)
    return children


def broken(*_):
    raise OSError("input/output error")


def finish(children):
    """Exit codes, or minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def kill(children, sig=signal.SIGKILL):
    for pid in children:
        os.kill(pid, sig)


def left(path):
    """All that a run leaves that does not depend on the clock: digests of weights and samples, the log."""
    out = path / "out"
    files = [*sorted(out.glob("iteration-*/model.safetensors")), *sorted(out.glob("samples/*"))]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return ([hashlib.sha256(f.read_bytes()).hexdigest() for f in files],
            [{k: v for k, v in row.items() if "second" not in k} for row in log])


def said(path):
    return (path / "said").read_text()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def undisturbed(request, tmp_path_factory):
    """A whole run: number of processes, its folder, its flags, how long it took."""
    path = tmp_path_factory.mktemp("whole")
    flags, began = [*tiny.folder(path), *RUN], time.time()
    assert finish(start(flags, request.param)) == [0] * request.param, said(path)
    assert len(left(path)[0]) == 4 and len(left(path)[1]) == 5
    return request.param, path, flags, time.time() - began


def like(undisturbed, path):
    """The flags of the same run in another folder."""
    _, whole, flags, _ = undisturbed
    return [f.replace(f"--out_dir={whole}", f"--out_dir={path}") for f in flags]


def test_killed_at_twenty_random_moments(undisturbed, tmp_path):
    """Sampling, within a step, while saving, between iterations; two processes are killed together."""
    world, whole, _, seconds = undisturbed
    chance, kills, runs, places = random.Random(world), 0, 0, set()
    while kills < 20:
        path, runs = tmp_path / str(runs), runs + 1
        path.mkdir()
        flags = like(undisturbed, path)
        codes = [-9]
        while codes[0] == -9:
            children = start([*flags, "--resume"], world)
            if kills < 20:
                time.sleep(chance.uniform(0.2, 0.7) * seconds)
                kill(children)
            codes = finish(children)
            kills += codes[0] == -9
            states = sorted((path / "out/state").glob("*[0-9]")) if (path / "out/state").exists() else []
            assert len(states) <= 4, "the last two are kept, and what a kill left there when it was to be cleared away"
            files = [s / "state.json" for s in states]
            places |= {(state["iteration"], state["step"]) for state in
                       (json.loads(f.read_text()) for f in files if f.exists())}
        assert codes == [0] * world, said(path)
        assert left(path) == left(whole)
    assert len(places) > 4, "killed in different places"


def test_sigterm_saves_and_says_how_to_go_on(undisturbed, tmp_path):
    world, whole, _, seconds = undisturbed
    flags = like(undisturbed, tmp_path)
    children = start([*flags, "--save_every=1000"], world)  # so that what is there is what SIGTERM saved
    while not (tmp_path / "out/log.jsonl").exists():  # the first step
        time.sleep(0.005)
    kill(children[:1], signal.SIGTERM)  # all stop when one is told to
    assert finish(children) == [0] * world, said(tmp_path)
    command = re.search(r"go on with: (.*)", said(tmp_path))[1]
    assert command.startswith("python sami.py" if world == 1 else "torchrun --nnodes=1 --nproc_per_node=2 -- sami.py")
    assert command.endswith("--resume") and f"--out_dir={tmp_path}/out" in command
    state = sorted((tmp_path / "out/state").glob("*[0-9]"))[-1]
    assert (state / "weights").is_dir() and json.loads((state / "state.json").read_text())["step"] > 0
    assert finish(start([*flags, "--resume"], world)) == [0] * world
    assert left(tmp_path) == left(whole)


def stopped(undisturbed, path, iteration, step):
    """The flags of a run that was killed as soon as it had saved this step."""
    world, flags = undisturbed[0], like(undisturbed, path)
    children = start(flags, world)
    at = lambda: [json.loads((s / "state.json").read_text()) for s in sorted((path / "out/state").glob("*[0-9]"))]
    while True:
        try:
            if any((s["iteration"], s["step"]) == (iteration, step) for s in at()):
                break
        except (FileNotFoundError, NotADirectoryError):  # just cleared away
            pass
        time.sleep(0.002)
    kill(children)
    finish(children)
    return flags


@pytest.mark.parametrize("what", ["weights", "samples.jsonl", "state.json", "sha256.json"])
def test_a_damaged_state_is_seen_and_the_one_before_is_taken(undisturbed, tmp_path, what):
    world, whole, _, _ = undisturbed
    flags = stopped(undisturbed, tmp_path, 2, 2)
    newest = sorted((tmp_path / "out/state").glob("*[0-9]"))[-1]
    victim = next((newest / what).glob("*.distcp")) if what == "weights" else newest / what
    data = victim.read_bytes()
    victim.write_bytes(data[:-7] if what != "samples.jsonl" else data.replace(b'"number": ', b'"number": 1', 1))
    assert finish(start([*flags, "--resume"], world)) == [0] * world, said(tmp_path)
    assert f"{newest} is damaged, going back to" in said(tmp_path)
    assert left(tmp_path) == left(whole)


def test_no_whole_state_or_a_damaged_model_is_an_error(undisturbed, tmp_path):
    world = undisturbed[0]
    flags = stopped(undisturbed, tmp_path, 2, 2)
    model = tmp_path / "out/iteration-1/model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    assert finish(start([*flags, "--resume"], world)) == [2] * world
    assert "iteration-1 is damaged" in said(tmp_path) and "without --resume" in said(tmp_path)
    model.write_bytes(whole)
    for state in (tmp_path / "out/state").glob("*[0-9]"):
        (state / "state.json").write_text("{")
    assert finish(start([*flags, "--resume"], world)) == [2] * world
    assert "no state in" in said(tmp_path)


def test_what_one_process_cannot_read_is_damaged_for_all(undisturbed, tmp_path):
    world = undisturbed[0]
    flags = stopped(undisturbed, tmp_path, 2, 2)
    assert finish(start([*flags, "--resume"], world, unreadable=True)) == [2] * world
    assert "no state in" in said(tmp_path)


def test_a_full_disk_is_told_and_what_was_saved_is_kept(undisturbed, tmp_path):
    """No file may grow over 60 kB: samples fit, weights do not."""
    world, whole, _, _ = undisturbed
    flags = like(undisturbed, tmp_path)
    codes = finish(start(flags, world, largest_file=60_000))
    assert 1 in codes and 0 not in codes, said(tmp_path)
    assert re.search(r"error.*: .*state/\d+ cannot be saved: .*make room there, then .* --resume", said(tmp_path))
    assert "Traceback" not in said(tmp_path)
    assert finish(start([*flags, "--resume"], world)) == [0] * world
    assert "going on in iteration 1 behind step 0" in said(tmp_path)
    assert left(tmp_path) == left(whole)


def test_a_run_of_an_older_version_is_refused(tmp_path):
    flags = [*tiny.folder(tmp_path), *RUN]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sami.json").write_text(json.dumps(dict(config={})))
    assert finish(start([*flags, "--resume"])) == [2]
    assert "is of an older version; start again without --resume" in said(tmp_path)


def test_what_would_be_another_run_is_refused(undisturbed, tmp_path):
    world, whole, flags, _ = undisturbed
    before = left(whole)
    assert finish(start([*flags, "--resume", "--lr=1"], world)) == [2] * world
    assert "has --lr=0.001, not 1.0: resume it with its own flags" in said(whole)
    train = whole / "task/train.jsonl"
    text = train.read_text()
    train.write_text(text + '{"query": "one more"}\n')
    assert finish(start([*flags, "--resume"], world)) == [2] * world
    assert "has changed since the run in" in said(whole)
    train.write_text(text)
    assert finish(start([*flags, "--resume", "--tokens_per_pass=99", "--save_every=7"], world)) == [0] * world
    assert left(whole) == before, "it was finished: nothing is done again"


@pytest.mark.parametrize("ways", [("none", "fsdp"), ("fsdp", "none"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_the_number_of_processes_may_change(tmp_path, ways):
    """Killed within the second iteration and resumed: the same data, the same weights but for rounding."""
    world = [1 if way == "none" else 2 for way in ways]
    flags = [*tiny.folder(tmp_path), *RUN]
    assert finish(start(flags)) == [0], said(tmp_path)
    want = [AutoModelForCausalLM.from_pretrained(tmp_path / f"out/iteration-{k}").state_dict() for k in (1, 2)]
    shutil.rmtree(tmp_path / "out")
    setting = (world[0], tmp_path, [*flags, f"--parallel={ways[0].replace('none', 'auto')}"], 0)
    stopped(setting, tmp_path, 2, 2)
    flags += [f"--parallel={ways[1].replace('none', 'auto')}", "--resume"]
    assert finish(start(flags, world[1])) == [0] * world[1]
    for k, old in zip((1, 2), want):
        new = AutoModelForCausalLM.from_pretrained(tmp_path / f"out/iteration-{k}").state_dict()
        assert max((new[name] - old[name]).abs().max() for name in old) < 1e-5


def test_one_process_that_fails_ends_all_with_its_message(tmp_path):
    """Process 1 breaks while process 0 waits for it."""
    flags, script = [*tiny.folder(tmp_path), *RUN], tmp_path / "broken.py"
    script.write_text("import sami\n\ndef broken(*_, **__):\n    raise sami.RunFailed('this one is broken')\n\n"
                      "if sami.RANK == 1:\n    sami.sample = broken\nsami.run(sami.main)\n")
    began = time.time()
    done = launch(2, str(script), *flags, timeout=90)
    assert done.returncode != 0 and time.time() - began < 60
    assert "error of process 1: this one is broken" in done.stderr
