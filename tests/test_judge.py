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
FAULTS = ("busy", "broken server", "silence", "dropped", "cut off")
STATUS = {"busy": 429, "broken server": 503, "forbidden": 401, "elsewhere": 302}
STATUS |= {"content filter": 400, "no temperature": 400}


def completion(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer "good"; the pairs are numbered in the task.

    server.fault(handler) picks what goes wrong, or, as a tuple, what the reply's content is.
    """

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        task = body["messages"][-1]["content"]
        row = int(re.search(r"Question (\d+)", task)[1])
        self.row = row
        fault = self.server.fault(self)
        key = self.headers.get("Authorization")
        self.server.log.append((row, fault, key, self.path, body["model"]))
        self.server.asked.append(body)
        if fault == "no temperature" and "temperature" not in body:
            fault = None
        if fault == "silence":
            time.sleep(1.5)
        if fault in ("silence", "dropped"):
            return self.connection.close()
        choice = "A" if task.index("good") < task.index("bad") else "B"
        verdict = json.dumps({"reason": "it says {good}", "choice": choice})
        text = {
            "content filter": b'{"error": {"message": "blocked by the content filter"}}',
            "no temperature": b'{"error": {"message": "temperature is not supported"}}',
            "forbidden": f'{{"error": "no such key: {KEY.strip()}"}}'.encode(),
            "not json": b"<html>",
            "no completion": b'{"choices": []}',
            "deep": b"[" * 200_000,
        }.get(str(fault), completion(fault[0] if isinstance(fault, tuple) else verdict))
        self.send_response(STATUS.get(str(fault), 200))
        if fault == "elsewhere":
            port = self.server.server_port
            self.send_header("Location", f"http://127.0.0.1:{port}/stolen")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[:-20] if fault == "cut off" else text)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.log, server.asked, server.fault = (
        True,
        [],
        [],
        lambda handler: None,
    )
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
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
    program = "import data, eval; eval.TRIES, eval.WAIT = 30, 0; data.run(eval.main)"
    command = [sys.executable, "-c", program, "judge", *files, "--timeout", "1"]
    return [*command, *map(str, flags)]


def environment():
    return {**os.environ, "OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)}


def judge(server, folder, monkeypatch, tries=8, **options):
    """The same as the command, in this process."""
    monkeypatch.setattr(evaluation, "TRIES", tries)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(folder)
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    settings = dict(base_url=address, model="m", out="j.json", timeout=0.4) | options
    monkeypatch.setattr(evaluation, "WAIT", 0)
    evaluation.judge("a.csv", "b.csv", **settings)


def verdicts(folder):
    lines = (folder / "j.json").read_text().rpartition("\n")[0].splitlines()
    return sorted(map(json.loads, lines), key=lambda r: r["row"])


def test_no_pair_is_lost_when_much_goes_wrong_and_none_is_asked_twice_after_a_kill(
    server, tmp_path, monkeypatch
):
    """Each kind of fault in 7 % of the requests, and a kill in the middle."""
    n = 100
    outputs(tmp_path, n)
    rng = random.Random(0)
    server.fault = lambda handler: rng.choice((*FAULTS, *[None] * 7))
    flags = ("--workers", 32)
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


READ = [
    ('Let me {think}. ```json\n{"reason": "it says {good}", "choice": "A"}\n``` Done.', "a"),
    ("{'reason': 'x', 'choice': 'B'}", "b"),
    ('{"choice": "Tie"}', "tie"),
    ('{"choice": "Answer B", "reason": "A is worse"}', "b"),
    (json.dumps('{\n "reason": "good",\n "choice": "A"\n}'), "a"),
    ([{"type": "text", "text": '{\n  "reason": "good",\n  "choice": "B"\n}'}], "b"),
    ("choice: A\nreason: it is correct", "a"),
    ("**Choice:** B", "b"),
    ('{"reason": "both are right", "winner": "B"}', "b"),
    ("<think>choice: B? No.</think>choice: A", "a"),
    ("A", "a"),
    ("**B**", "b"),
    ("[[A]]", "a"),
    ("Answer A", "a"),
    ([{"type": "text", "text": "A"}], "a"),
    ("The better answer is A.", "a"),
    ("It's a tie.", "tie"),
    ("B. It is complete.", "b"),
    ("A\n\nB is not complete.", "a"),
    ('{"choice": "B", "reason": "choice: a good one"}', "b"),
    ("<think>Both are right.</think>\n\nThe winner is B.", "b"),
    ("Both are right, but B is longer.\n\nFinal verdict: **A**", "a"),
]
UNREAD = [
    'Reply with {"reason": "...", "choice": "A" or "B" or "tie"}',
    '{"choice": "C"}',
    "choice: A/B/tie",
    'My choice: either "A" or "B"',
    'choice: "A", "B" or "tie"',
    "Answer A: it is right.\nAnswer B: it is right, too.",
    "Assistant B is not better.",
    "A good question.",
    "I cannot judge this.",
    "Winner: a tough call",
    "<think>choice: A. But wait",
    "",
    None,
]


@pytest.mark.parametrize("content, shown", READ + [(content, "unparsed") for content in UNREAD])
def test_a_reply_is_read_as_a_person_would(server, tmp_path, monkeypatch, content, shown):
    """Two pairs, so that something has a verdict; the first is shown with `good` as A or as B."""
    outputs(tmp_path, 2)
    server.fault = lambda handler: (content,) if handler.row == 0 else None
    judge(server, tmp_path, monkeypatch)
    verdict = verdicts(tmp_path)[0]
    swap = {"a": "b", "b": "a"} if verdict["swapped"] else {}
    assert verdict["choice"] == swap.get(shown, shown)


def test_what_nobody_can_read_is_asked_for_once_more_then_counted_beside_the_rate(
    server, tmp_path, monkeypatch, capsys
):
    outputs(tmp_path, 3)
    mumbled = []

    def fault(handler):  # the first reply for row 0 is mumbled, and all for row 1
        mumbles = handler.row == 1 or (handler.row == 0 and not mumbled)
        mumbled.append(handler.row)
        return ("Hm.",) if mumbles else None

    server.fault = fault
    judge(server, tmp_path, monkeypatch, workers=1)
    assert Counter(row for row, *_ in server.log) == {0: 2, 1: 2, 2: 1}
    assert [r["choice"] for r in verdicts(tmp_path)] == ["a", "unparsed", "a"]
    row = table(capsys)
    assert (row["n"], row["unparsed"], row["rate"]) == ("2", "1", "100")
    judge(server, tmp_path, monkeypatch)
    assert len(server.log) == 5


def table(capsys):
    header, row = capsys.readouterr().out.splitlines()[-2:]
    return dict(zip(header.split(), row.split()[1:]))


def test_replies_have_a_limit_of_tokens(server, tmp_path, monkeypatch):
    outputs(tmp_path, 2)
    server.fault = lambda handler: ("Hm.",) if handler.row == 0 else None
    judge(server, tmp_path, monkeypatch)
    assert len(server.asked) == 3
    assert all(body["max_tokens"] <= 1000 for body in server.asked)


def test_a_model_that_refuses_a_temperature_can_judge(server, tmp_path, monkeypatch):
    outputs(tmp_path, 4)
    server.fault = lambda handler: "no temperature"
    judge(server, tmp_path, monkeypatch)
    assert [r["choice"] for r in verdicts(tmp_path)] == ["a", "b", "a", "b"]


def test_a_pair_that_is_refused_does_not_keep_the_others_from_being_judged(
    server, tmp_path, monkeypatch, capsys
):
    outputs(tmp_path, 4)
    server.fault = lambda handler: "content filter" if handler.row == 0 else None
    judge(server, tmp_path, monkeypatch, workers=1)
    assert [r["choice"] for r in verdicts(tmp_path)] == ["refused", "b", "a", "b"]
    assert table(capsys)["refused"] == "1"
    assert "blocked by the content filter" in verdicts(tmp_path)[0]["reason"]
    server.fault = lambda handler: None
    judge(server, tmp_path, monkeypatch)  # it may be allowed by now
    assert table(capsys)["n"] == "4"


@pytest.mark.parametrize("fault, says", [("not json", "<html>"), ("no completion", "choices")])
def test_what_is_no_chat_completion_is_shown_and_asked_for_again(
    server, tmp_path, monkeypatch, fault, says
):
    """As behind a base_url without /v1: no pair is lost to it."""
    outputs(tmp_path, 3)
    server.fault = lambda handler: fault
    with pytest.raises(data.DataError, match=says):
        judge(server, tmp_path, monkeypatch, workers=1)
    server.fault = lambda handler: None
    judge(server, tmp_path, monkeypatch)
    assert [r["choice"] for r in verdicts(tmp_path)] == ["a", "b", "a"]


@pytest.mark.parametrize("n, tries", [(50, 3), (2, 3)])
def test_a_refusal_of_every_pair_stops_early_and_gives_the_servers_reason(
    server, tmp_path, monkeypatch, n, tries
):
    outputs(tmp_path, n)
    has_ended = threading.Event()

    def fault(handler):  # two requests for each of three pairs, then nothing until the end
        if len(server.log) >= 2 * tries:
            has_ended.wait()
        return "content filter"

    server.fault = fault
    with pytest.raises(data.DataError, match="400.*blocked by the content filter"):
        judge(server, tmp_path, monkeypatch, workers=1, tries=tries, timeout=60)
    has_ended.set()


@pytest.mark.parametrize(
    "fault, says", [("forbidden", "401"), ("elsewhere", "302"), ("busy", "429")]
)
def test_an_endpoint_that_refuses_ends_the_run(server, tmp_path, monkeypatch, fault, says):
    outputs(tmp_path, 4)
    has_ended = threading.Event()
    asked = 2 if fault == "busy" else 4  # two tries for one pair, or two refusals of two pairs

    def first_ones(handler):
        if len(server.log) >= asked:
            has_ended.wait()
        return fault

    server.fault = first_ones
    with pytest.raises(data.DataError, match=says) as error:
        judge(server, tmp_path, monkeypatch, workers=1, tries=2, timeout=60)
    has_ended.set()
    assert KEY not in str(error.value) + (tmp_path / "j.json").read_text()
    assert all(r["choice"] == "refused" for r in verdicts(tmp_path))
    assert not any(entry[3] == "/stolen" for entry in server.log)
    server.fault = lambda handler: None
    judge(server, tmp_path, monkeypatch)
    assert len(verdicts(tmp_path)) == 4


@pytest.mark.parametrize("fault", ["not json", "no completion", "deep"])
def test_a_reply_that_is_no_chat_completion_is_asked_for_once_more(
    server, tmp_path, monkeypatch, fault
):
    """The first request gets it; then all is well."""
    outputs(tmp_path, 3)
    server.fault = lambda handler: None if server.log else fault
    judge(server, tmp_path, monkeypatch, workers=1)
    assert [r["choice"] for r in verdicts(tmp_path)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://a b.c/v1", "abc", "http://[::1"],
)
def test_an_address_that_cannot_be_ends_at_once(server, tmp_path, monkeypatch, address):
    outputs(tmp_path, 2)
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: 1 / (not seconds))  # no wait
    with pytest.raises(data.DataError, match="--base_url"):
        judge(server, tmp_path, monkeypatch, base_url=address)


def test_nobody_there_ends_at_once(server, tmp_path, monkeypatch):
    outputs(tmp_path, 2)
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: 1 / (not seconds))  # no wait
    with pytest.raises(data.DataError, match="refused"):
        judge(server, tmp_path, monkeypatch, base_url="http://127.0.0.1:9")


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


@pytest.mark.parametrize(
    "change", ["negative", "no number", "another answer", "no dict", "text", "a word"]
)
def test_a_damaged_judgments_file_is_refused_and_stays_as_it_is(
    server, tmp_path, monkeypatch, change
):
    outputs(tmp_path, 3)
    judge(server, tmp_path, monkeypatch)
    last = verdicts(tmp_path)[-1]
    changed = {
        "negative": json.dumps(last | {"row": -1}) + "\n",
        "no number": json.dumps(last | {"row": "2"}) + "\n",
        "another answer": json.dumps(last | {"a": "?"}) + "\n",
        "no dict": "5\n",
        "text": "my notes",
        "a word": "row",
    }[change]
    (tmp_path / "j.json").write_text(changed)
    asked = len(server.log)
    with pytest.raises(data.DataError, match="another --out"):
        judge(server, tmp_path, monkeypatch)
    assert len(server.log) == asked and (tmp_path / "j.json").read_text() == changed


@pytest.mark.parametrize("cut", [1, 9, 50])
def test_a_line_that_a_kill_left_unfinished_is_asked_for_again(server, tmp_path, monkeypatch, cut):
    outputs(tmp_path, 3)
    judge(server, tmp_path, monkeypatch, workers=1)
    whole = (tmp_path / "j.json").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "j.json").write_text("".join(lines[:2]) + lines[2][:cut])
    judge(server, tmp_path, monkeypatch)
    assert (tmp_path / "j.json").read_text() == whole and len(server.log) == 4


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
    row = evaluation.winrate_of(file)
    rate = (wins + ties / 2) / (wins + ties + losses)
    assert (row["a"], row["tie"], row["b"], row["rate"]) == (wins, ties, losses, rate)
    assert row["low"] == pytest.approx(low, abs=1e-6)
    assert row["high"] == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"names": {"a": "x", "b": "y"}, "results": []}',
        '{"names": {"a": "x", "b": "y"}, "results": [1]}',
        '{"row": 1, "choice": "unparsed"}\n',
        '{"row": 1}\n',
        '{"row": 1, "choice": "a"',
    ],
)
def test_a_file_without_sound_judgments_is_refused(tmp_path, content):
    (tmp_path / "j.json").write_text(content)
    with pytest.raises(data.DataError, match="j.json"):
        evaluation.winrate_of(str(tmp_path / "j.json"))
