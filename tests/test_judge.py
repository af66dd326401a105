"""The judge against a server that misbehaves in every way, and win rates against known ones."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
import eval as evaluation

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-0123456789"
FAULTS = ("busy", "broken server", "silence", "dropped", "cut off", "not json", "no completion")
STATUS = {"busy": 429, "broken server": 503, "forbidden": 401, "elsewhere": 302}


def completion(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer "good"; the pairs are numbered in the task.

    server.fault(handler) picks what goes wrong.
    """

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        task = body["messages"][-1]["content"]
        row = int(re.search(r"Question (\d+)", task)[1])
        fault = self.server.fault(self)
        key = self.headers.get("Authorization")
        self.server.log.append((row, fault, key, self.path, body["model"]))
        if fault == "silence":
            time.sleep(1)
        if fault in ("silence", "dropped"):
            return self.connection.close()
        choice = "A" if task.index("good") < task.index("bad") else "B"
        verdict = json.dumps({"reason": "it says {good}", "choice": choice})
        text = {
            "prose": completion(f"Let me {{think}}. ```json\n{verdict}\n``` Done."),
            "echo": completion('Reply with {"reason": "...", "choice": "A" or "B" or "tie"}'),
            "wrong choice": completion('{"choice": "C"}'),
            "no verdict": completion("{A is better"),
            "tie": completion('{"choice": "Tie"}'),
            "nothing": completion(None),
            "not json": b"<html>",
            "no completion": b'{"choices": []}',
            "deep": b"[" * 200_000,
        }.get(fault, completion(verdict))
        if fault == "slow headers":
            return self.drip(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000)
        self.send_response(STATUS.get(fault, 200))
        if fault == "elsewhere":
            port = self.server.server_port
            self.send_header("Location", f"http://127.0.0.1:{port}/stolen")
        if fault not in ("drip", "flood"):
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if fault == "drip":
            return self.drip(text + b" " * 1000)
        if fault == "flood":
            return self.flood()
        self.wfile.write(text[:-20] if fault == "cut off" else text)

    def drip(self, text):
        for i in range(len(text)):
            self.wfile.write(text[i : i + 1])
            time.sleep(0.1)

    def flood(self):
        while True:
            self.wfile.write(b" " * 100_000)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.log, server.fault = True, [], lambda handler: None
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_csv(file, rows):
    with open(file, "w", newline="") as f:
        csv.writer(f).writerows([("x", "y_pred", "y_true"), *rows])


def outputs(folder, n):
    """Two outputs files: the first has "good" where the row is even, the second where it is odd."""
    for name, even, odd in (("a", "good", "bad"), ("b", "bad", "good")):
        rows = [(f"Question {i}", odd if i % 2 else even, "good") for i in range(n)]
        write_csv(folder / f"{name}.csv", rows)


def judge_command(server, folder, *flags):
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    files = ["a.csv", "b.csv", "--out", "j.json", "--base_url", address, "--model", "m"]
    patience = ["--timeout", "0.4", "--wait", "0.01"]
    return [sys.executable, ROOT / "eval.py", "judge", *files, *patience, *map(str, flags)]


def environment():
    return {**os.environ, "OPENAI_API_KEY": KEY}


def judge(server, folder, monkeypatch, **options):
    """The same as the command, in this process."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(folder)
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    settings = dict(base_url=address, model="m", out="j.json", timeout=0.4, wait=0.01) | options
    evaluation.judge("a.csv", "b.csv", **settings)


def verdicts(folder):
    results = json.loads((folder / "j.json").read_text())["results"]
    return sorted(results, key=lambda r: r["row"])


def test_no_pair_is_lost_when_much_goes_wrong_and_none_is_asked_twice_after_a_kill(
    server, tmp_path, monkeypatch
):
    """Each kind of fault in 10 % of the requests, and a kill in the middle."""
    n = 100
    outputs(tmp_path, n)
    rng = random.Random(0)
    server.fault = lambda handler: rng.choice((*FAULTS, None, None, None))
    flags = ("--workers", 32, "--tries", 100)
    killed = subprocess.Popen(
        judge_command(server, tmp_path, *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    while not (tmp_path / "j.json").exists() or len(verdicts(tmp_path)) < n / 4:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    printed = killed.communicate()[0]
    time.sleep(0.1)
    before = {r["row"] for r in verdicts(tmp_path)}
    asked_before = len(server.log)
    assert n / 4 <= len(before) < n
    command = judge_command(server, tmp_path, *flags)
    settings = dict(capture_output=True, text=True, env=environment(), cwd=tmp_path)
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr
    results = verdicts(tmp_path)
    assert [r["row"] for r in results] == list(range(n))
    assert not before & {row for row, *_ in server.log[asked_before:]}
    # the verdict is about the file, in whatever order the answers were shown
    assert all(r["choice"] == ("b" if r["row"] % 2 else "a") for r in results)
    assert n / 4 < sum(r["swapped"] for r in results) < 3 * n / 4
    good = Counter(row for row, fault, *_ in server.log if fault is None)
    assert set(good) == set(range(n))
    assert sum(times - 1 for times in good.values()) <= 32  # what was in flight at the kill
    assert {entry[2:] for entry in server.log} == {(f"Bearer {KEY}", "/v1/chat/completions", "m")}
    written = "".join(f.read_text() for f in tmp_path.iterdir())
    assert KEY not in printed + done.stdout + done.stderr + written
    asked = len(server.log)
    judge(server, tmp_path, monkeypatch)
    assert len(server.log) == asked  # all there: nothing is asked


@pytest.mark.parametrize(
    "fault, choice",
    [
        ("prose", "a"),
        ("wrong choice", "unparsed"),
        ("no verdict", "unparsed"),
        ("echo", "unparsed"),
        ("nothing", "unparsed"),
        ("tie", "tie"),
    ],
)
def test_replies_are_read_leniently_and_what_cannot_be_read_counts_as_a_tie(
    server, tmp_path, monkeypatch, fault, choice
):
    outputs(tmp_path, 1)
    server.fault = lambda handler: fault
    judge(server, tmp_path, monkeypatch)
    assert [r["choice"] for r in verdicts(tmp_path)] == [choice]
    file = str(tmp_path / "j.json")
    assert evaluation.winrates_of(file)[file]["rate"] == (1.0 if choice == "a" else 0.5)


@pytest.mark.parametrize(
    "fault, says", [("forbidden", "401"), ("elsewhere", "302"), ("busy", "429")]
)
def test_an_endpoint_that_refuses_ends_the_run(server, tmp_path, monkeypatch, fault, says):
    outputs(tmp_path, 4)
    server.fault = lambda handler: fault
    with pytest.raises(data.DataError, match=says) as error:
        judge(server, tmp_path, monkeypatch, workers=1, tries=2)
    assert KEY not in str(error.value)
    assert len(server.log) == (2 if fault == "busy" else 1)
    assert verdicts(tmp_path) == [] and not any(entry[3] == "/stolen" for entry in server.log)
    server.fault = lambda handler: None
    judge(server, tmp_path, monkeypatch)
    assert len(verdicts(tmp_path)) == 4


@pytest.mark.parametrize("fault", ["drip", "slow headers", "flood", "deep"])
def test_a_reply_that_never_ends_or_is_nested_too_deeply_is_a_bad_reply(
    server, tmp_path, monkeypatch, fault
):
    """The first request gets it; then all is well."""
    outputs(tmp_path, 3)
    server.fault = lambda handler: None if server.log else fault
    began = time.monotonic()
    judge(server, tmp_path, monkeypatch, workers=1)
    assert time.monotonic() - began < 10
    assert [r["choice"] for r in verdicts(tmp_path)] == ["a", "b", "a"]


def test_replies_that_drip_do_not_keep_the_command_from_ending(server, tmp_path):
    outputs(tmp_path, 2)
    server.fault = lambda handler: "drip"
    command = judge_command(server, tmp_path, "--tries", 2)
    settings = dict(capture_output=True, text=True, env=environment(), cwd=tmp_path)
    done = subprocess.run(command, **settings, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "go on with the same command" in last, done.stderr
    assert "Traceback" not in done.stderr and KEY not in done.stderr


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://a b.c/v1", "abc", "http://[::1"],
)
def test_an_address_that_cannot_be_ends_at_once(server, tmp_path, monkeypatch, address):
    outputs(tmp_path, 2)
    with pytest.raises(data.DataError, match="--base_url"):
        judge(server, tmp_path, monkeypatch, base_url=address, wait=100)


def test_nobody_there_ends_at_once(server, tmp_path, monkeypatch):
    outputs(tmp_path, 2)
    with pytest.raises(data.DataError, match="refused"):
        judge(server, tmp_path, monkeypatch, base_url="http://127.0.0.1:9", wait=100)


def test_a_key_with_a_line_break_is_not_shown(server, tmp_path, monkeypatch, capsys):
    outputs(tmp_path, 1)
    monkeypatch.setattr(sys.modules[__name__], "KEY", KEY + "\n")
    judge(server, tmp_path, monkeypatch)
    assert server.log[0][2] == f"Bearer {KEY.strip()}"
    assert KEY.strip() not in "".join(capsys.readouterr())


def test_the_same_command_with_other_answers_or_another_judge_is_refused(
    server, tmp_path, monkeypatch
):
    outputs(tmp_path, 3)
    judge(server, tmp_path, monkeypatch)
    asked = len(server.log)
    with pytest.raises(data.DataError, match="another --out"):
        judge(server, tmp_path, monkeypatch, model="another")
    write_csv(tmp_path / "b.csv", [(f"Question {i}", "bad", "good") for i in range(3)])
    with pytest.raises(data.DataError, match="another --out"):
        judge(server, tmp_path, monkeypatch)
    write_csv(tmp_path / "b.csv", [(f"Question {i}", "bad", "good") for i in (0, 7, 2)])
    with pytest.raises(data.DataError, match="other examples"):
        judge(server, tmp_path, monkeypatch)
    assert len(server.log) == asked


@pytest.mark.parametrize("change", ["twice", "negative", "no number", "another answer", "no dict"])
def test_a_damaged_judgments_file_is_refused(server, tmp_path, monkeypatch, change):
    outputs(tmp_path, 3)
    judge(server, tmp_path, monkeypatch)
    judgments = json.loads((tmp_path / "j.json").read_text())
    last = judgments["results"][-1]
    changed = {
        "twice": [last, last],
        "negative": [last | {"row": -1}],
        "no number": [last | {"row": "2"}],
        "another answer": [last | {"a": "?"}],
        "no dict": [5],
    }[change]
    (tmp_path / "j.json").write_text(json.dumps(judgments | {"results": changed}))
    asked = len(server.log)
    with pytest.raises(data.DataError, match="another --out"):
        judge(server, tmp_path, monkeypatch)
    assert len(server.log) == asked


# ---- Win rates ----


def write_judgments(file, wins, ties, losses, **more):
    results = [{"choice": c} for c in ["A"] * wins + ["tie"] * ties + ["b"] * losses]
    content = {"names": {"a": "x", "b": "y"}, "results": results} | more
    file.write_text(json.dumps(content))
    return str(file)


# wins, ties, losses -> the two roots x of (x - rate)^2 = z^2 x (1 - x) / n
GOLDEN = [
    (100, 29, 123, 0.3940343, 0.5160663),
    (360, 273, 367, 0.4655837, 0.527443),
    (0, 0, 5, 0.0, 0.4344825),
    (7, 0, 0, 0.6456696, 1.0),
    (0, 4, 0, 0.150039, 0.849961),
    (1, 0, 0, 0.2065493, 1.0),
    (3, 2, 5, 0.1681803, 0.6873262),
    (50, 100, 20, 0.5130999, 0.6594711),
]


@pytest.mark.parametrize("wins, ties, losses, low, high", GOLDEN)
def test_win_rates_have_wilsons_interval(tmp_path, wins, ties, losses, low, high):
    file = write_judgments(tmp_path / "j.json", wins, ties, losses)
    row = evaluation.winrates_of(file)[file]
    rate = (wins + ties / 2) / (wins + ties + losses)
    assert (row["wins"], row["ties"], row["losses"], row["rate"]) == (wins, ties, losses, rate)
    assert row["low"] == pytest.approx(low, abs=1e-6)
    assert row["high"] == pytest.approx(high, abs=1e-6)


def test_scores_of_the_file_that_differ_from_its_choices_are_shown_beside_them(tmp_path, capsys):
    file = write_judgments(tmp_path / "j.json", 3, 2, 5, scores={"x": 5.0, "y": 5.0})
    evaluation.winrate([file])
    printed = capsys.readouterr().out
    assert " 40 " in printed and " 50 " in printed and "by its scores" in printed


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"names": {"a": "x", "b": "y"}, "results": []}',
        '{"names": {"a": "x", "b": "y"}, "results": [1]}',
        '{"results": [{"row": 1, "choice": "a"}, {"row": 1, "choice": "a"}]}',
        '{"results": [{"row": -1, "choice": "a"}]}',
        '{"names": {"a": "x"}, "results": [{"choice": "a"}], "scores": []}',
        '{"names": {"a": "x"}, "results": [{"choice": "a"}], "scores": {"x": "many"}}',
        '{"names": {"a": "x"}, "results": [{"choice": "a"}], "scores": {"x": -1e9}}',
        '{"names": {"a": []}, "results": [{"choice": "a"}], "scores": {"x": 1}}',
        '{"names": [], "results": [{"choice": "a"}], "scores": {"x": 1}}',
    ],
)
def test_a_file_without_sound_judgments_is_refused(tmp_path, content):
    (tmp_path / "j.json").write_text(content)
    with pytest.raises(data.DataError, match="j.json"):
        evaluation.winrates_of(str(tmp_path / "j.json"))
