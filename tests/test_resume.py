"""A run that is killed or out of disk space ends in the very bytes of one that was not."""
import gc, hashlib, json, os, random, re, resource, shutil, signal, socket, sys, threading, time
from pathlib import Path

import pytest
import torch
import transformers.distributed  # here, so that forked processes need not import it
from transformers import AutoModelForCausalLM

import sami, tiny
from test_parallel import launch

RUN = ["--iterations=2", "--steps=2,3", "--eval_queries=2", "--temperature=0.5"]
PHASES = dict(load_model="loading", collect="sampling", train="training", save_model="saving",
              measure="measuring")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def beside(flags):
    """The folder that holds out_dir."""
    return Path(next(f for f in flags if f.startswith("--out_dir=")).partition("=")[2]).parent


def note(path, name, count=1):
    """Add a line to a file of path: when, what."""
    if sami.RANK == 0:
        with open(path / name, "a") as f:
            f.write(f"{time.time()} {count}\n")


def noted(path, name):
    """-> [(when, what)]"""
    text = (path / name).read_text() if (path / name).exists() else ""
    return [(float(line.split()[0]), line.split()[1]) for line in text.split("\n")[:-1]]


def watch(path):
    """Write down which phase begins, and how many training queries are sampled."""
    def phase(function, name):
        return lambda *args, **how: (note(path, "phases", name), function(*args, **how))[1]

    for name, what in PHASES.items():
        setattr(sami, name, phase(getattr(sami, name), what))
    real = sami.sample_examples

    def counting(model, tokenizer, task, queries, cfg, iteration, temperature):
        if iteration > 0:
            note(path, "sampled", len(queries))
        return real(model, tokenizer, task, queries, cfg, iteration, temperature)

    sami.sample_examples = counting


def start(flags, world=1, largest_file=None):
    """`sami.py flags` in `world` forked processes -> their ids. What they say goes to a file."""
    port, children, path = free_port(), [], beside(flags)
    for rank in range(world):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 99
        signal.alarm(100)  # ends it: a test may fail but not hang
        torch.set_num_threads(1)  # makes a pool anew, which two threads at once must not
        gc.freeze()  # else gc.collect() copies all memory that is shared with the parent
        try:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank),
                              LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            sami.tqdm.set_lock(threading.RLock())  # not the one that all forks share
            sami.RANK, sami.WORLD, sami.LOCAL_RANK, sami.NODE = rank, world, rank, world
            sys.argv = ["sami.py", *flags]
            sys.stdout = sys.stderr = open(path / "said", "a", buffering=1)
            watch(path)
            if largest_file:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            sami.run(sami.main)
            note(path, "phases", "done")
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        finally:
            os._exit(code)
    return children


def finish(children):
    """Exit codes, or minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(children, sig=signal.SIGKILL):
    for pid in children:
        os.kill(pid, sig)


def await_phase(path, children, phase, iteration=1):
    """Until this run begins the phase for the iteration-th time from now, or has ended."""
    before = len(noted(path, "phases"))
    while not any(map(ended, children)):
        if [what for _, what in noted(path, "phases")[before:]].count(phase) == iteration:
            return
        time.sleep(0.001)


def left(path):
    """What does not depend on the clock: digests of weights and samples, the log."""
    out = path / "out"
    files = [*sorted(out.glob("iteration-*/model.safetensors")), *sorted(out.glob("samples/*"))]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return ([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files],
            [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
             for row in log])


def said(path):
    return (path / "said").read_text()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def undisturbed(request, tmp_path_factory):
    """A whole run: number of processes, its folder, its flags."""
    path = tmp_path_factory.mktemp("whole")
    flags = [*tiny.folder(path), *RUN]
    assert finish(start(flags, request.param)) == [0] * request.param, said(path)
    digests, log = left(path)
    assert len(digests) == 4 and len(log) == 5 + 3, "5 steps, and 3 models on held-out queries"
    return request.param, path, flags


def like(undisturbed, path):
    """The flags of the same run in another folder."""
    _, whole, flags = undisturbed
    path.mkdir(exist_ok=True)
    return [f.replace(f"--out_dir={whole}", f"--out_dir={path}") for f in flags]


def test_killed_at_twenty_random_moments(undisturbed, tmp_path):
    """Sampling, within a step, while saving; two processes are killed together."""
    world, whole, _ = undisturbed
    times, lasted = noted(whole, "phases"), {}
    for (begun, what), (over, _) in zip(times, times[1:]):
        lasted[what] = min(lasted.get(what, over - begun), over - begun)
    chance, places, runs = random.Random(world), [], 0
    phases = ("sampling", "training", "saving")
    enough = lambda: len(places) >= 20 and min(map(places.count, phases)) >= 3
    while not enough():
        path, runs = tmp_path / str(runs), runs + 1
        flags, codes = [*like(undisturbed, path), "--resume"], [-9]
        while -9 in codes:
            children = start(flags, world)
            if not enough():
                phase = min(phases, key=places.count)  # a kill may come when that is over
                await_phase(path, children, phase)
                time.sleep(chance.uniform(0, lasted[phase]))
                kill(children)
            codes = finish(children)
            if -9 in codes:
                places.append((noted(path, "phases") or [(0, "start")])[-1][1])
        assert codes == [0] * world, said(path)
        assert left(path) == left(whole)
        assert not list((path / "out").glob("*.tmp"))
        assert len(places) < 60, places


def unfinished(whole, path):
    """A copy of the run as it was while it sampled for iteration 2."""
    shutil.copytree(whole / "out", path / "out")
    shutil.rmtree(path / "out/iteration-2")
    return path / "out/samples/iteration-2.jsonl"


def test_a_cut_last_line_costs_that_line_only(undisturbed, tmp_path):
    world, whole, _ = undisturbed
    flags = like(undisturbed, tmp_path)
    samples = unfinished(whole, tmp_path)
    samples.write_bytes(samples.read_bytes()[:-20])
    assert finish(start([*flags, "--resume"], world)) == [0] * world, said(tmp_path)
    assert [what for _, what in noted(tmp_path, "sampled")] == ["1"]
    assert left(tmp_path) == left(whole)


def test_sampling_goes_on_behind_any_line(tmp_path):
    """Wherever a samples file ends, it grows to the same bytes, though some queries are dropped."""
    tiny.folder(tmp_path, train=52, drop_if_contains=["b"])
    task, model = sami.load_task(tmp_path / "task"), tiny.model()
    cfg = sami.Config(n=2, temperature=0.5, max_new_tokens=6, batch_size=4, out_dir=str(tmp_path))
    path = tmp_path / "samples/iteration-1.jsonl"
    path.parent.mkdir()
    sami.collect(model, tiny.tokenizer(), task, cfg, 1, 20)
    whole = path.read_bytes()
    rows = whole.splitlines(keepends=True)
    dropped = sum(json.loads(row)["dropped"] is not None for row in rows)
    assert dropped > 0 and len(rows) > 20 and len(rows) % 4 == 0
    for k in range(1, len(rows)):
        path.write_bytes(b"".join(rows[:k]))
        sami.collect(model, tiny.tokenizer(), task, cfg, 1, 20)
        assert path.read_bytes() == whole, f"from {k} of {len(rows)} lines"


def test_a_broken_line_in_the_middle_is_refused(undisturbed, tmp_path):
    world, whole, _ = undisturbed
    flags = like(undisturbed, tmp_path)
    samples = unfinished(whole, tmp_path)
    first, second, *rest = samples.read_bytes().splitlines(keepends=True)
    for broken in (second[:-20] + b"\n", b"{}\n", b'{"number": 1, "query": "a"}\n',
                   second.replace(b'"responses": [', b'"responses": ["one too many", ')):
        samples.write_bytes(b"".join([first, broken, *rest]))
        before = samples.read_bytes()
        assert finish(start([*flags, "--resume"], world)) == [2] * world
        assert f"{samples} line 2 must hold" in said(tmp_path)
        assert "Traceback" not in said(tmp_path) and samples.read_bytes() == before
        (tmp_path / "said").unlink()


def test_samples_of_another_program_are_trained_on(undisturbed, tmp_path):
    """Five queries from elsewhere, without ids; the run samples the other three itself."""
    world, whole, flags = undisturbed
    flags = like(undisturbed, tmp_path)
    path, said_by_all = tmp_path / "out/samples/iteration-1.jsonl", []
    rows = (whole / "out/samples/iteration-1.jsonl").read_text().splitlines()
    for k, row in enumerate(map(json.loads, rows[:5])):
        mine = {key: row[key] for key in ("number", "query", "constitutions")}
        said_by_all.append(dict(mine, responses=[f"b{k}ab", f"zz {k}"]))
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in said_by_all))
    elsewhere = path.read_bytes()
    assert finish(start([*flags, "--resume"], world)) == [0] * world, said(tmp_path)
    assert path.read_bytes().startswith(elsewhere) and len(path.read_bytes().splitlines()) >= 8
    first = next(row for row in left(tmp_path)[1] if row.get("step") == 1)
    task, ids = sami.load_task(whole / "task"), lambda text: tiny.tokenizer()(text).input_ids
    losses = []
    for row in said_by_all[:4]:
        prompts = [ids(task.prompt(row["query"], c)) for c in row["constitutions"]]
        with torch.no_grad():
            logp = sami.logp_matrix(tiny.model(), prompts, [ids(y) for y in row["responses"]])
        losses.append(float(sami.sami_loss(logp)))
    assert first["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5), "tokenised as they are"
    assert first["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("full", ["weights", "samples"])
def test_a_full_disk_is_told_and_what_was_saved_is_kept(undisturbed, tmp_path, full):
    """No file may grow over 60 kB: samples fit, weights do not. Over 3 kB: nor do samples."""
    world, whole, _ = undisturbed
    flags = like(undisturbed, tmp_path)
    limit = dict(weights=60_000, samples=3_000)[full]
    codes = finish(start(flags, world, largest_file=limit))
    assert codes[0] == 1 and 0 not in codes, said(tmp_path)
    kept = (tmp_path / "out/samples/iteration-1.jsonl").read_bytes()
    # how the others notice that process 0 is gone is torchrun's business
    told = re.search(r"^error.*", said(tmp_path), re.M)[0]
    assert "iteration-1" in told and "--resume" in told, said(tmp_path)
    assert world > 1 or "Traceback" not in said(tmp_path)
    assert not (tmp_path / "out/iteration-1").exists()
    assert finish(start([*flags, "--resume"], world)) == [0] * world, said(tmp_path)
    assert left(tmp_path) == left(whole)
    whole_lines = kept[:kept.rfind(b"\n") + 1]
    assert (tmp_path / "out/samples/iteration-1.jsonl").read_bytes().startswith(whole_lines)


def test_what_would_be_another_run_is_refused(undisturbed, tmp_path):
    world, whole, flags = undisturbed
    before = left(whole)
    for flag, told in {"--lr=1": "lr=0.001", "--n=3": "n=2", "--seed=2": "seed=1"}.items():
        assert finish(start([*flags, "--resume", flag], world)) == [2] * world
        assert f"was begun with other flags or another task: {told}; resume it" in said(whole)
    train = whole / "task/train.jsonl"
    text = train.read_text()
    try:
        train.write_text(text + '{"query": "one more"}\n')
        assert finish(start([*flags, "--resume"], world)) == [2] * world
        assert "another task: task_sha256=" in said(whole)
    finally:
        train.write_text(text)
    codes = finish(start([*flags, "--resume", "--tokens_per_pass=99", "--sample_batch=3"], world))
    assert codes == [0] * world, said(whole)
    assert left(whole) == before, "it was finished: nothing is done again"


def test_a_second_run_in_the_same_folder_is_refused(undisturbed, tmp_path):
    """The first is held up in the middle, so that it is there whatever the clock does."""
    world, whole, _ = undisturbed
    flags = like(undisturbed, tmp_path)
    first = start(flags, world)
    await_phase(tmp_path, first, "training")
    kill(first, signal.SIGSTOP)
    try:
        for more in ([], ["--resume"]):
            codes = finish(start([*flags, *more], world))
            assert codes[0] == 2 and 0 not in codes, said(tmp_path)
            assert said(tmp_path).count("another run is at work in") == 1 + len(more)
    finally:
        kill(first, signal.SIGCONT)
    assert finish(first) == [0] * world, said(tmp_path)
    assert left(tmp_path) == left(whole), "and has done the first no harm"


def weights(path, k):
    return AutoModelForCausalLM.from_pretrained(path / f"out/iteration-{k}").state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole run of one process: its folder, its flags."""
    path = tmp_path_factory.mktemp("alone")
    flags = [*tiny.folder(path), *RUN]
    assert finish(start(flags)) == [0], said(path)
    return path, flags


@pytest.mark.parametrize("ways", ["auto fsdp", "fsdp auto", "fsdp ddp", "ddp fsdp"])
def test_the_number_of_processes_may_change(alone, tmp_path, ways):
    """Killed within the second iteration: the same data, the same weights but for rounding."""
    whole, flags = alone
    worlds = [1 if way == "auto" else 2 for way in ways.split()]
    first, second = (f"--parallel={way}" for way in ways.split())
    flags = like((1, whole, flags), tmp_path)
    children = start([*flags, first], worlds[0])
    await_phase(tmp_path, children, "training", 2)
    kill(children)
    assert -9 in finish(children) and not (tmp_path / "out/iteration-2").exists()
    assert finish(start([*flags, second, "--resume"], worlds[1])) == [0] * worlds[1], said(tmp_path)
    assert left(tmp_path)[0][2:] == left(whole)[0][2:], "samples"
    for k in (1, 2):
        old, new = weights(whole, k), weights(tmp_path, k)
        assert max((new[name] - old[name]).abs().max() for name in old) < 1e-5


def test_one_process_that_fails_ends_all_with_its_message(tmp_path):
    """Process 1 breaks while process 0 waits for it."""
    flags, script = [*tiny.folder(tmp_path), *RUN], tmp_path / "broken.py"
    script.write_text("import sami\n\ndef broken(*_, **__):\n"
                      "    raise sami.RunFailed('this one is broken')\n\n"
                      "if sami.RANK == 1:\n    sami.sample = broken\nsami.run(sami.main)\n")
    began = time.time()
    done = launch(2, str(script), *flags, timeout=90)
    assert done.returncode != 0 and time.time() - began < 60
    assert "error of process 1: this one is broken" in done.stderr
