"""The `http` judge: another service scores the group.

Request: POST, JSON {"prompts": [messages, ..], "completions": [text, ..], and each column as a
list}. Answer: JSON {"scores": [number or null, ..]}, one per completion.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Annotated, Any

from pydantic import Field, HttpUrl

Score = float | None


def http(
    prompts: list[Any],
    completions: list[str],
    *,
    url: HttpUrl,
    timeout_seconds: Annotated[float, Field(gt=0)] = 10.0,
    retries: Annotated[int, Field(ge=0)] = 1,
    backoff_seconds: Annotated[float, Field(ge=0)] = 0.2,
    error_score: float | None = None,
    **columns: Any,
) -> list[Score]:
    """The scores that the service at `url` answers.

    A lost connection, a timeout or a status of 429 or 500 and above is tried again `retries` times,
    with twice the wait each time. Then, and for any other wrong answer, each completion scores
    error_score; without one it is an error, and reward.on_error decides. All tries together should
    fit into reward.timeout_seconds: then the worker is replaced.
    """
    body = json.dumps({"prompts": prompts, "completions": completions, **columns}, default=str)
    for attempt in range(retries + 1):
        try:
            return _scores(_post(str(url), body, timeout_seconds), len(completions))
        except (ConnectionError, ValueError) as error:
            failure = error
            if isinstance(error, ValueError):
                break
            if attempt < retries:
                time.sleep(backoff_seconds * 2**attempt)
    if error_score is None:
        raise failure
    return [error_score] * len(completions)


def _post(url: str, body: str, timeout_seconds: float) -> Any:
    """The answer's JSON; ConnectionError for what may pass, ValueError for what will not."""
    import httpx

    try:
        headers = {"Content-Type": "application/json"}
        answer = _client().post(url, content=body, headers=headers, timeout=timeout_seconds)
    except httpx.HTTPError as error:
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error
    if answer.status_code == 429 or answer.status_code >= 500:
        raise ConnectionError(f"{url} answered {answer.status_code}")
    if answer.status_code != 200:
        raise ValueError(f"{url} answered {answer.status_code}; it must answer 200 with scores")
    return answer.json()


@functools.cache
def _client() -> Any:
    import httpx

    return httpx.Client()


def _scores(answer: Any, count: int) -> list[Score]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    fits = isinstance(scores, list) and len(scores) == count
    if not fits or any(s is not None and type(s) not in (int, float) for s in scores or ()):
        raise ValueError(
            f"the answer {str(answer)[:80]} is wrong; it must be "
            f'{{"scores": [..]}} with {count} numbers or nulls'
        )
    return list(scores or ())
