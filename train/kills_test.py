"""Runs that are killed again and again end bit for bit like one that is left alone."""

import json
import random
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train.data.testing import write_boxes

# Imports everything once, and forks a child for each line of the input, a list in JSON: the
# arguments of the run, where to kill it, at which call there, and how many seconds later. Answers
# with the exit status of the child.
SERVER = textwrap.dedent(
    """
    import json, os, signal, sys, threading, time, warnings
    warnings.filterwarnings("ignore", "os.fork")
    import train.__main__, train.checkpoint, train.log, train.lost_process, train.program
    import train.results, train.run, train.run_dir, train.sharding, train.validate
    from train.stand_in import Small

    def save_model(folder, variables, record, step):
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(step))

    train.program.UNETR = Small
    train.run.save_model = save_model
    train.distributed.HEARTBEAT_SECONDS = 5
    PLACES = {
        "data": (train.run, "prepare"),
        "run.json": (train.run_dir, "write_text"),
        "restore": (train.checkpoint.Checkpoints, "restore_last"),
        "step": (train.sharding, "shard_batch"),
        "save": (train.checkpoint.Checkpoints, "save_last"),
        "save best": (train.checkpoint.Checkpoints, "save_best"),
        "metrics": (train.log.RunLog, "_record"),
        "validate": (train.validate, "judge"),
        "export": (train.run, "save_model"),
        "report": (train.results, "write_report"),
    }

    def kill_at(place, call, delay):
        if place not in ("export", "report", "step"):
            # Where the place is not reached again, as there is nothing to do there.
            kill_at("step", 12, delay)
        owner, name = PLACES[place]
        function, calls = getattr(owner, name), []

        def die():
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)

        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                threading.Thread(target=die).start()
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    for line in sys.stdin:
        args, *kill = json.loads(line)
        child = os.fork()
        if not child:
            if kill:
                kill_at(*kill)
            os.dup2(2, 1)
            try:
                os._exit(train.__main__.main(args))
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)
KILLED = -9


class Server:
    """A process that runs the training application, and kills it on demand."""

    def __init__(self, log):
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self, args, *kill):
        self._process.stdin.write(json.dumps([args, *kill]) + "\n")
        self._process.stdin.flush()

    def status(self):
        return int(self._process.stdout.readline())

    def run(self, args, *kill):
        self.start(args, *kill)
        return self.status()

    def close(self):
        self._process.communicate(timeout=60)
        self._log.close()


@pytest.fixture
def servers(tmp_path):
    servers = [Server(tmp_path / f"log_{i}.txt") for i in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    cases = []
    for i in range(6):
        label = np.zeros((16, 16, 16), np.uint8)
        label[4 : 9 + i % 3, 3:12, 5:13] = 1
        image = (300.0 * label + rng.normal(0, 100, label.shape)).astype(np.int16)
        cases.append((image, label))
    return write_boxes(tmp_path_factory.mktemp("data"), cases)


def arguments(data, out, epochs):
    line = (
        "--resume auto --roi-size 16 16 16 --patch-size 16 16 16 --light-r 32 --hidden-size 16 "
        "--num-heads 2 --batch-size 2 --val-fraction 0.34 --learning-rate 0.02 --ema-decay 0.9 "
        "--dropout-rate 0.1 --eval-every 2"
    )
    return [*line.split(), "--data", str(data), "--out", str(out), "--epochs", str(epochs)]


def left_by(out):
    """Returns all that a run leaves, but for times."""
    last = max((out / "checkpoints" / "last").iterdir(), key=lambda path: int(path.name))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(last / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        state = checkpointer.restore(last / "state", args=args)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {
        "state": state,
        "progress": json.loads((last / "progress" / "metadata").read_text()),
        "metrics": [json.loads(line) | {"seconds": 0, "waiting_for_data": 0} for line in lines],
        "validation": json.loads((out / "validation.json").read_text()),
        "model": (out / "model" / "step").read_text(),
        "report": (out / "report.md").read_text().replace(out.name, "run"),
    }


def assert_same(killed, straight):
    state, expected = killed.pop("state"), straight.pop("state")
    assert state.keys() == expected.keys()

    def compare(a, b):
        if isinstance(b, dict):
            assert a.keys() == b.keys()
            for name in b:
                compare(a[name], b[name])
        elif isinstance(b, list | tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            np.testing.assert_array_equal(a, b)

    compare(state, expected)
    assert killed == straight


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(servers, data, tmp_path):
    server = servers[0]
    assert server.run(arguments(data, tmp_path / "straight", 80)) == 0
    args = arguments(data, tmp_path / "killed", 80)
    rng = random.Random(0)
    places = ["restore", "step", "save", "save", "save best", "metrics", "metrics", "validate"]
    rng.shuffle(places)
    killed = 0
    for place in ["data", "run.json", *places, *places[::-1]]:
        call = 1 if place in ("data", "run.json", "restore") else rng.randint(1, 2)
        status = server.run(args, place, call, rng.uniform(0, 0.05))
        assert status in (0, KILLED), place
        killed += status == KILLED
    # While the results are made, which a run that has reached its end makes again.
    for place in ("export", "report") * 3:
        status = server.run(args, place, 1, rng.uniform(0, 0.02))
        assert status in (0, KILLED), place
        killed += status == KILLED
    assert server.run(args) == 0
    assert killed >= 20
    assert_same(left_by(tmp_path / "killed"), left_by(tmp_path / "straight"))


@pytest.mark.slow
def test_kills_of_one_of_two_processes_end_the_other_and_leave_no_trace(servers, data, tmp_path):
    def run(out, who=None, *kill):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        for i, server in enumerate(servers):
            args = [*arguments(data, out, 12), "--num-processes", "2", "--process-id", str(i)]
            server.start([*args, "--coordinator-address", address], *(kill if i == who else ()))
        return [server.status() for server in servers]

    assert run(tmp_path / "straight") == [0, 0]
    rng, told = random.Random(1), [0, 0]
    for place in ("step", "save", "validate", "metrics"):
        for who in (0, 1):
            if place == "metrics" and who == 1:
                continue  # only the first process writes them
            statuses = run(tmp_path / "killed", who, place, 2, rng.uniform(0, 0.05))
            assert statuses[who] == KILLED, place
            assert statuses[1 - who] not in (0, KILLED), place
            # A process of its own writes the line, and outlives the one that it explains.
            log, line = tmp_path / f"log_{1 - who}.txt", f"process {who} of the run died"
            last = time.monotonic() + 20
            while log.read_text().count(line) <= told[who] and time.monotonic() < last:
                time.sleep(0.1)
            assert log.read_text().count(line) == told[who] + 1, place
            told[who] += 1
    assert run(tmp_path / "killed") == [0, 0]
    assert_same(left_by(tmp_path / "killed"), left_by(tmp_path / "straight"))
