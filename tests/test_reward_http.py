"""The http judge against a loopback server: what each kind of answer scores."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.registry import RewardSet
from asyncgrpo.rewards.registry import load_rewards as load
from asyncgrpo.settings.reward import RewardSettings
from asyncgrpo.types import Prompt

PROMPT = Prompt(
    prompt_id="p1",
    messages=({"role": "user", "content": "3 + 4"},),
    answer="7",
    data_source="sums",
    columns={"url": "not the service", "seen": {1, 2}},
)


class Service(ThreadingHTTPServer):
    """Answers with the next of `plan`: (status, body), or "hang"; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.plan: list[tuple[int, str] | str] = []
        self.asked: list[dict] = []
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Answer(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        plan = self.server.plan
        step = plan.pop(0) if len(plan) > 1 else plan[0]
        if step == "hang":
            self.server.done.wait(30)
            return
        status, text = step
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    thread.join()
    server.server_close()


def judge(url: str, **options: object) -> RewardSet:
    options = {"url": url, "backoff_seconds": 0, **options}
    functions = [{"use": "http", "options": options}]
    return load(RewardSettings.model_validate({"functions": functions}))


def test_the_service_gets_all_columns_and_its_scores_are_the_rewards(service):
    service.plan = [(200, '{"scores": [1, 0.5]}')]
    scores = judge(service.url).score(PROMPT, ["7", "sieben \ud800"])
    assert scores.rewards.tolist() == [1.0, 0.5]
    message = {"role": "user", "content": "3 + 4"}
    assert service.asked == [
        {
            "prompts": [[message], [message]],
            "completions": ["7", "sieben \ud800"],
            "seen": ["{1, 2}"] * 2,
            "answer": ["7", "7"],
            "data_source": ["sums", "sums"],
        }
    ]


def test_null_means_that_the_service_does_not_judge_this_completion(service):
    service.plan = [(200, '{"scores": [null, 1]}')]
    with pytest.raises(RewardError, match="no reward function applies to completion 0"):
        judge(service.url).score(PROMPT, ["a", "b"])


@pytest.mark.parametrize("first", [(500, "oops"), (503, ""), (429, "later")])
def test_what_may_pass_is_tried_again(service, first):
    service.plan = [first, (200, '{"scores": [1]}')]
    assert judge(service.url).score(PROMPT, ["7"]).rewards.tolist() == [1.0]
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("step", "asked", "said"),
    [
        ((500, "oops"), 3, "answered 500"),
        ("hang", 3, "ReadTimeout"),
        ((404, ""), 1, "answered 404; it must answer 200 with scores"),
        ((200, "no json"), 1, "JSONDecodeError"),
        ((200, "[1]"), 1, r"the answer \[1\] is wrong; it must be"),
        ((200, '{"scores": [1, 2]}'), 1, r'must be {"scores": \[..\]} with 1 numbers or nulls'),
        ((200, '{"scores": ["1"]}'), 1, "is wrong"),
        ((200, '{"scores": [true]}'), 1, "is wrong"),
        ((200, '{"scores": [NaN]}'), 1, "returned nan for completion 0"),
    ],
)
def test_a_service_that_fails_is_an_error_or_scores_what_the_option_says(
    service, step, asked, said
):
    service.plan = [step]
    options = {"retries": 2, "timeout_seconds": 1.0 if step == "hang" else 20}
    with pytest.raises(RewardError, match=said):
        judge(service.url, **options).score(PROMPT, ["7"])
    assert len(service.asked) == asked
    if "nan" not in said:
        scores = judge(service.url, error_score=-1, **options).score(PROMPT, ["7"])
        assert scores.rewards.tolist() == [-1.0]


def test_a_service_that_is_not_there_is_named(service):
    url = service.url
    service.shutdown()
    service.server_close()
    with pytest.raises(RewardError, match=f"'http' raised ConnectionError: {url}: ConnectError"):
        judge(url).probe(PROMPT)
