"""Ask a real Prometheus, which scrapes a real steered server, every query of the Grafana dashboard.

In order:
    server       `vllm serve TARGET` with the steered drafter, a draft tree and the run-time switch
    Prometheus   the `prometheus` on PATH (Debian and Ubuntu: apt-get install prometheus) with docker/prometheus.yml,
                 pointed at that server
    traffic      clients ask all the time, half of them greedily; steered, then at scale 0, then steered again
    queries      every query of docker/grafana/dashboards/vllm-steer.json, Grafana's variables filled in

Fails when a query has no number to show. A plot shows the panels as Grafana would draw them, from the same answers.
It measures no speed: rates rise and fall with whatever else the machine does.

    python benchmarks/dashboard.py examples/tiny_pair/target examples/tiny_pair/steered \
        examples/tiny_pair/heldout.jsonl --json dashboard.json --plot dashboard.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import write_report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from server import Server, free_port, serve  # noqa: E402

DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "vllm-steer.json"
CONFIG = ROOT / "docker" / "prometheus.yml"
VARIABLES = {"$model": ".*", "$engine": ".*", "$__rate_interval": "20s"}  # four scrapes, as Grafana chooses it
STEP = 5  # seconds


def get(url: str, **query: Any) -> Any:
    """The JSON answer to a GET request."""
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.loads(answer.read())


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes `target` (host:port) as ours is configured; yields its address."""
    binary = shutil.which("prometheus") or sys.exit("there is no `prometheus` on PATH: apt-get install prometheus")
    config = CONFIG.read_text(encoding="utf-8")
    assert "server:8000" in config
    (folder / "prometheus.yml").write_text(config.replace("server:8000", target), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *options, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        for _ in range(60):
            try:
                if get(f"http://{address}/api/v1/targets")["data"]["activeTargets"]:
                    break
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.5)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def traffic(server: Server, model: str, prompts: list[str], clients: int, stop: threading.Event) -> tuple[list, list]:
    """Clients that ask until `stop` is set: (their threads, their errors)."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=120, max_retries=0)
    errors: list[str] = []

    def ask(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            try:
                client.completions.create(
                    model=model, prompt=rng.choice(prompts), max_tokens=rng.randint(16, 64), temperature=number % 2
                )
            except Exception as error:  # told at the end
                errors.append(f"{type(error).__name__}: {error}")
                return

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    return threads, errors


def queries() -> list[dict[str, str]]:
    """{"panel", "legend", "expr"} of every query of the dashboard, and those that fill its variables."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [
        {"panel": panel["title"], "legend": target["legendFormat"], "expr": target["expr"]}
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":  # label_values(SERIES, LABEL)
            series = variable["definition"].removeprefix("label_values(").rpartition(",")[0]
            found.append({"panel": f"variable {variable['name']}", "legend": "", "expr": series})
    return found


def filled(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"a variable that nobody fills in: {expr}"
    return expr


def answer(url: str, query: dict[str, str], start: float, end: float) -> dict[str, Any]:
    """`query` with Prometheus' series over the run, and its value now; "numbers" counts those that are no NaN."""
    expr = filled(query["expr"])
    over = get(f"{url}/api/v1/query_range", query=expr, start=start, end=end, step=STEP)["data"]["result"]
    now = get(f"{url}/api/v1/query", query=expr, time=end)["data"]["result"]
    series = []
    for one in over:
        legend = query["legend"]
        for label, value in one["metric"].items():
            legend = legend.replace("{{" + label + "}}", value)
        points = [(round(float(t) - start), float(value)) for t, value in one["values"]]
        series.append({"legend": legend, "points": [[t, round(v, 4)] for t, v in points if math.isfinite(v)]})
    last = [round(float(one["value"][1]), 4) for one in now if math.isfinite(float(one["value"][1]))]
    return query | {"numbers": sum(len(one["points"]) for one in series), "now": last, "series": series}


def plot(path: Path, answers: list[dict[str, Any]], marks: list[float]) -> None:
    """The panels as small multiples; `marks` are the seconds at which the switch was thrown."""
    from matplotlib.figure import Figure

    panels = {a["panel"]: [] for a in answers if not a["panel"].startswith("variable")}
    for a in answers:
        panels.get(a["panel"], []).extend(a["series"])
    figure = Figure(figsize=(14, 12), layout="constrained")
    places = list(figure.subplots(-(-len(panels) // 3), 3).flat)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, series) in zip(places, panels.items(), strict=False):
        for one in series:
            if one["points"]:
                axes.plot(*zip(*one["points"], strict=True), label=one["legend"] or None, linewidth=1)
        for mark in marks:
            axes.axvline(mark, color="grey", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=10)
        if any(one["legend"] for one in series):
            axes.legend(fontsize=7)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    figure.supxlabel("seconds; dotted: scale 0, then 1 again")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("drafter", type=Path, help="steered drafter")
    parser.add_argument("prompts", type=Path, help='JSONL of {"prompt": text}')
    parser.add_argument("--seconds", type=float, nargs=3, default=[60, 45, 45], help="steered, at scale 0, steered")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--k", type=int, default=5, help="drafts per block")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="further options of `vllm serve`, last")
    args = parser.parse_args()
    from vllm_steer.data.prompts import read_prompts

    prompts = [found.prompt for found in read_prompts(str(args.prompts))]
    if not all(isinstance(prompt, str) for prompt in prompts):
        sys.exit(f"{args.prompts} has chats: this benchmark sends texts to continue")
    options = ("--served-model-name", "model", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
               "--max-num-seqs", "8", "--gpu-memory-utilization", "0.3", "--block-size", "32",
               "--additional-config", json.dumps({"vllm_steer": {"tree": [2] + [1] * (args.k - 1)}}),
               "--worker-extension-cls", "vllm_steer.serving.scale.Switch", *args.args)  # fmt: skip
    spec = {"model": str(args.drafter), "num_speculative_tokens": args.k}
    with tempfile.TemporaryDirectory() as name:
        folder, env = Path(name), {"VLLM_SERVER_DEV_MODE": "1"}
        with serve(args.target, folder / "log", *options, speculative=spec, env=env) as server:
            with prometheus(server.url.removeprefix("http://"), folder) as url:
                stop, marks, start = threading.Event(), [], time.time()
                threads, errors = traffic(server, "model", prompts, args.clients, stop)
                for seconds, scale in itertools.zip_longest(args.seconds, (0, 1)):
                    time.sleep(seconds)
                    if scale is not None:
                        assert server.steer(scale) == [{"rank": 0, "scale": scale}]
                        marks.append(round(time.time() - start))
                end = time.time()
                answers = [answer(url, query, start, end) for query in queries()]
                version = get(f"{url}/api/v1/status/buildinfo")["data"]["version"]
                stop.set()
                for thread in threads:
                    thread.join()
            warnings = (folder / "log").read_text(errors="replace").count("acceptance has collapsed")
    for a in answers:
        print(f"{'ok' if a['numbers'] else 'EMPTY':<6}{a['numbers']:>5} numbers  {a['panel']}: {a['expr']}")
    empty = [a["expr"] for a in answers if not a["numbers"]]
    if args.json:
        write_report(
            args.json, note="no measurement of speed: the machine did other work too", prometheus=version,
            seconds=args.seconds, switched_at=marks, errors=errors, empty=empty, watchdog_warnings=warnings,
            queries=answers,
        )  # fmt: skip
    if args.plot:
        plot(args.plot, answers, marks)
    return 1 if empty or errors else 0


if __name__ == "__main__":
    sys.exit(main())
