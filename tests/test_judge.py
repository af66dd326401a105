"""The judge against a server that misbehaves in every way, and win rates against other people's statistics."""
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


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer "good"; the pairs are numbered in the task. server.fault(handler) picks what goes wrong."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        task = body["messages"][-1]["content"]
        row = int(re.search(r"Question (\d+)", task)[1])
        fault = self.server.fault(self)
        self.server.log.append((row, fault, self.headers.get("Authorization"), self.path, body["model"]))
        if fault == "silence":
            time.sleep(1)
        if fault in ("silence", "dropped"):
            return self.connection.close()
        status = {"busy": 429, "broken server": 503, "forbidden": 401, "elsewhere": 302}.get(fault, 200)
        choice = "A" if task.index("good") < task.index("bad") else "B"
        verdict = json.dumps({"reason": "it says {good}", "choice": choice})
        content = {"prose": f"Let me {{think}}. ```json\n{verdict}\n``` Done.", "wrong choice": '{"choice": "C"}', "no verdict": "{A is better",
                   "tie": '{"choice": "Tie"}'}.get(fault, verdict)
        text = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        text = {"not json": b"<html>", "no completion": b'{"choices": []}'}.get(fault, text)
        self.send_response(status)
        if fault == "elsewhere":
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/stolen")
        self.send_header("Content-Length", str(len(text) + (100 if fault == "cut off" else 0)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST
    log_message = lambda *args: None


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.log, server.fault = True, [], lambda handler: None
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def outputs(folder, n):
    """Two outputs files of n pairs: the first has "good" where the row is even, the second where it is odd."""
    for name, even in (("a", "good"), ("b", "bad")):
        rows = [(f"Question {i}", even if i % 2 == 0 else {"good": "bad", "bad": "good"}[even], "good") for i in range(n)]
        evaluation.write_outputs(folder / f"{name}.csv", rows)
    return [folder / "a.csv", folder / "b.csv"]


def judge_command(server, folder, *flags):
    return [sys.executable, ROOT / "eval.py", "judge", folder / "a.csv", folder / "b.csv", "--base_url", f"http://127.0.0.1:{server.server_port}/v1/",
            "--model", "m", "--out", folder / "j.json", "--timeout", "0.4", "--wait", "0.01", *map(str, flags)]


def judge(server, folder, *flags):
    return subprocess.run(judge_command(server, folder, *flags), capture_output=True, text=True, env={**os.environ, "OPENAI_API_KEY": KEY})


def verdicts(folder):
    return json.loads((folder / "j.json").read_text())["results"]


def test_no_pair_is_lost_when_much_goes_wrong_and_none_is_asked_twice_after_a_kill(server, tmp_path):
    """Each kind of fault in 10 % of the requests, and a kill in the middle."""
    n = 100
    outputs(tmp_path, n)
    rng = random.Random(0)
    server.fault = lambda handler: rng.choice((*FAULTS, None, None, None))
    env = {**os.environ, "OPENAI_API_KEY": KEY}
    flags = ("--workers", 32, "--max_failures", 5000)
    killed = subprocess.Popen(judge_command(server, tmp_path, *flags), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "j.json").exists() or len(verdicts(tmp_path)) < n / 4:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    printed = killed.communicate()[0]
    time.sleep(0.1)
    before, asked_before = {r["row"] for r in verdicts(tmp_path)}, len(server.log)
    assert n / 4 <= len(before) < n
    done = judge(server, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    results = verdicts(tmp_path)
    assert [r["row"] for r in results] == list(range(n))
    assert not before & {row for row, *_ in server.log[asked_before:]}
    assert all(r["choice"] == ("a" if r["row"] % 2 == 0 else "b") for r in results)       # whatever the order in which they were shown
    assert n / 4 < sum(r["swapped"] for r in results) < 3 * n / 4
    good = Counter(row for row, fault, *_ in server.log if fault is None)
    assert set(good) == set(range(n)) and sum(n - 1 for n in good.values()) <= 32       # only what was in flight at the kill
    assert {auth for _, _, auth, path, model in server.log if (path, model) == ("/v1/chat/completions", "m")} == {f"Bearer {KEY}"}
    assert KEY not in printed + done.stdout + done.stderr + "".join(f.read_text() for f in tmp_path.iterdir())
    asked = len(server.log)
    assert judge(server, tmp_path).returncode == 0 and len(server.log) == asked           # all there: nothing is asked


@pytest.mark.parametrize("fault, choice", [("prose", "a"), ("wrong choice", "unparsed"), ("no verdict", "unparsed"), ("tie", "tie")])
def test_replies_are_read_leniently_and_what_cannot_be_read_is_kept_as_a_tie(server, tmp_path, fault, choice):
    outputs(tmp_path, 1)
    server.fault = lambda handler: fault
    done = judge(server, tmp_path)
    assert done.returncode == 0 and [r["choice"] for r in verdicts(tmp_path)] == [choice]
    assert ("1 of 1 replies had no verdict" in done.stdout) == (choice == "unparsed")
    assert evaluation.winrate_of(tmp_path / "j.json")["rate"] == (1.0 if choice == "a" else 0.5)
    if choice == "unparsed":
        assert verdicts(tmp_path)[0]["reason"] in ('{"choice": "C"}', "{A is better")


@pytest.mark.parametrize("fault, complaint", [("forbidden", "HTTP 401"), ("elsewhere", "HTTP 302"), ("busy", "too many failures")])
def test_an_endpoint_that_refuses_ends_the_run_in_one_line(server, tmp_path, fault, complaint):
    outputs(tmp_path, 4)
    server.fault = lambda handler: fault
    done = judge(server, tmp_path, "--workers", 1, "--max_failures", 1)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and complaint in last and KEY not in done.stderr and "Traceback" not in done.stderr
    assert verdicts(tmp_path) == [] and not any(path == "/stolen" for *_, path, _ in server.log)
    server.fault = lambda handler: None
    assert judge(server, tmp_path).returncode == 0 and len(verdicts(tmp_path)) == 4


def test_mistakes_end_in_one_line(server, tmp_path):
    outputs(tmp_path, 3)
    assert judge(server, tmp_path).returncode == 0
    asked = len(server.log)
    for flags, complaint in ((("--seed", 1), "another --out"), (("--base_url", "http://127.0.0.1:9"), "cannot be reached"),
                             (("--base_url", "file:///etc"), "http://"), (("--workers", 0), "--workers")):
        if "--base_url" in flags:
            (tmp_path / "j.json").unlink(missing_ok=True)
        done = judge(server, tmp_path, *flags)
        assert done.returncode == 2 and complaint in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    assert len(server.log) == asked
    rows = list(csv.reader(open(tmp_path / "b.csv")))
    rows[2][0] = "Question 7"
    csv.writer(open(tmp_path / "b.csv", "w")).writerows(rows)
    done = judge(server, tmp_path)
    assert done.returncode == 2 and "row 2" in done.stderr and len(done.stderr.splitlines()) == 1


def write_judgments(file, wins, ties, losses):
    results = [{"choice": c} for c in ["A"] * wins + ["tie"] * ties + ["b"] * losses]
    file.write_text(json.dumps({"names": {"a": "x", "b": "y"}, "results": results}))
    return str(file)


# wins, ties, losses -> scipy.stats.binomtest(wins, wins + losses).pvalue, and the two roots x of (x - rate)^2 = z^2 x (1 - x) / n
GOLDEN = [
    (100, 29, 123, 0.140515870418, 0.3940343, 0.5160663),
    (360, 273, 367, 0.82392203637, 0.4655837, 0.527443),
    (0, 0, 5, 0.0625, 0.0, 0.4344825),
    (7, 0, 0, 0.015625, 0.6456696, 1.0),
    (0, 4, 0, 1.0, 0.150039, 0.849961),
    (1, 0, 0, 1.0, 0.2065493, 1.0),
    (3, 2, 5, 0.7265625, 0.1681803, 0.6873262),
    (50, 100, 20, 0.000440285006514, 0.5130999, 0.6594711),
]


@pytest.mark.parametrize("wins, ties, losses, p, low, high", GOLDEN)
def test_win_rates_agree_with_scipy(tmp_path, wins, ties, losses, p, low, high):
    r = evaluation.winrate_of(write_judgments(tmp_path / "j.json", wins, ties, losses))
    assert (r["wins"], r["ties"], r["losses"], r["rate"]) == (wins, ties, losses, (wins + ties / 2) / (wins + ties + losses))
    assert r["p"] == pytest.approx(p, rel=1e-9) and r["low"] == pytest.approx(low, abs=1e-6) and r["high"] == pytest.approx(high, abs=1e-6)
    n, rate = r["n"], r["rate"]
    deviation = (max(0, (wins + ties / 4) / n - rate**2) / n) ** 0.5                       # of a mean of 1s, halves and 0s
    assert r["boot_low"] == pytest.approx(rate - 1.96 * deviation, abs=0.02 + 0.5 / n)
    assert r["boot_high"] == pytest.approx(rate + 1.96 * deviation, abs=0.02 + 0.5 / n)


def test_a_file_whose_scores_differ_from_its_choices_is_told(tmp_path, capsys):
    file = Path(write_judgments(tmp_path / "j.json", 3, 2, 5))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scores": {"x": 5.0, "y": 5.0}}))
    evaluation.print_winrates([evaluation.winrate_of(str(file))])
    assert "40.00 %" in (out := capsys.readouterr().out) and "50.00 %" in out and "do not add up" in out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"names": {"a": "x", "b": "y"}, "results": []}', '{"names": {"a": "x", "b": "y"}, "results": [1]}',
                                     '{"names": [], "results": [{"choice": "a"}]}'])
def test_a_file_without_judgments_is_refused(tmp_path, content):
    (tmp_path / "j.json").write_text(content)
    with pytest.raises(data.DataError, match="j.json"):
        evaluation.winrate_of(str(tmp_path / "j.json"))


def test_agreement_counts_equal_answers(tmp_path, capsys):
    evaluation.write_outputs(tmp_path / "a.csv", [("q", "the red fox", "z"), ("r", "two", "z")])
    evaluation.write_outputs(tmp_path / "b.csv", [("q", "the red dog", "z"), ("r", "two ", "z")])
    evaluation.print_agreement(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert "50.0 % of 2 answers" in (out := capsys.readouterr().out) and f"{100 * (2 / 3 + 1) / 2:.3f}" in out
