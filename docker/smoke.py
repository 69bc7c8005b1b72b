"""Ask a running server one question through the openai client.

    python3 docker/smoke.py [URL]         default: http://127.0.0.1:8000

Waits until the server is healthy. Exit code 0 only if it answered and its own counters say that it drafted.
"""

from __future__ import annotations

import re
import sys
import time
import urllib.request

from openai import OpenAI

PATIENCE = 900  # seconds until a server that is not healthy is an error
PROMPT = "Write a function that adds two numbers."


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def wait_until_healthy(url: str) -> None:
    """Return when /health answers. Raises SystemExit after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            read(url + "/health")
            return
        except OSError as error:  # refused, reset, timed out, 503: not yet
            if time.monotonic() > deadline:
                raise SystemExit(f"{url}/health did not answer within {PATIENCE} s: {error}") from error
            time.sleep(1)


def counter(metrics: str, name: str) -> int:
    """Sum of one metric over its labels; 0 when it is not there."""
    return sum(int(float(value)) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE))


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    wait_until_healthy(url)
    client = OpenAI(base_url=url + "/v1", api_key="none", timeout=120, max_retries=0)
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=48, temperature=0)
    tokens = answer.usage.completion_tokens
    print(f"{model} answered {tokens} tokens: {answer.choices[0].text!r}")
    metrics = read(url + "/metrics")
    drafts = counter(metrics, "vllm:spec_decode_num_drafts_total")
    accepted = counter(metrics, "vllm:spec_decode_num_accepted_tokens_total")
    steering = counter(metrics, "vllm_steer:steering_on")
    print(f"{drafts} drafts, {accepted} draft tokens accepted, steering {'on' if steering else 'off or not reported'}")
    return 0 if tokens and drafts else 1


if __name__ == "__main__":
    sys.exit(main())
