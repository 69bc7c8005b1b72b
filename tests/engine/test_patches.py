"""The upstream diffs of patches/: they apply to the installed vLLM, and where one is applied the plugin uses vLLM's own
way and replaces nothing. Run as a script this file is an engine process that tells how its seams were taken.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_process
import engines
import pairs
import pytest
from repository import ROOT, SUPPORT

from vllm_steer.serving import patches as seams
from vllm_steer.serving import patching

PATCHES = ROOT / "patches"
FILES = sorted(PATCHES.glob("*.patch"))
VLLM = Path(find_spec("vllm").origin).parent
TINY = ROOT / "examples" / "tiny_pair"
NAMES = [f"{seam.module}:{seam.name}" for seam in seams.SEAMS if not seam.part]
OF_TREES = [f"{seam.module}:{seam.name}" for seam in seams.SEAMS if seam.part]  # there is no patch for these


def register() -> dict[str, dict[str, str]]:
    """The rows of the register's tables, by seam."""
    rows, head = [], None
    for line in (PATCHES / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else None
        if cells is None or head is None:
            head = cells
        elif set(line) != set("|-"):
            rows.append(dict(zip(head, cells, strict=True)))
    served = [row for row in rows if seams.MEDUSA or row["runner"] != "V1 of 0.32"]
    return {row["seam"].strip("`"): row for row in served}


def patch_of(name: str) -> Path:
    return PATCHES / re.search(r"\((.+\.patch)\)", register()[name]["patch"])[1]


# --- a patched vLLM --------------------------------------------------------------------------------------------------


def patched_files(patches: list[Path]) -> set[Path]:
    """What the patches change, relative to the folder that holds vllm/."""
    return {Path(name) for p in patches for name in re.findall(r"^\+\+\+ b/(\S+)", p.read_text("utf-8"), re.MULTILINE)}


def link_tree(folder: Path, to: Path, copied: set[Path], inside: Path) -> None:
    """Make `to` what `folder` is, of links: only `copied` files (relative to the root, `inside` of which this folder
    lies) and the folders on the way to them are real. So the installed vLLM is never written to."""
    to.mkdir()
    for entry in folder.iterdir():
        path = inside / entry.name
        if path in copied:
            shutil.copyfile(entry, to / entry.name)
        elif any(path in file.parents for file in copied):
            link_tree(entry, to / entry.name, copied, path)
        elif entry.name == "__pycache__":  # compiled code of what stays; the rest is compiled into this folder
            (to / entry.name).mkdir()
            changed = {file.stem for file in copied}
            for code in entry.iterdir():
                if code.name.partition(".")[0] not in changed:
                    (to / entry.name / code.name).symlink_to(code)
        else:
            (to / entry.name).symlink_to(entry)


def patched_vllm(to: Path, patches: list[Path]) -> Path:
    """A folder for PYTHONPATH with the installed vLLM, patched. Fails if a patch does not apply to the letter."""
    to.mkdir()
    link_tree(VLLM, to / "vllm", patched_files(patches), Path("vllm"))
    for patch in patches:
        done = subprocess.run(
            ["git", "apply", "--verbose", str(patch)],
            cwd=to,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(to.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "Skipped" not in done.stderr, (
            f"{patch.name} does not apply to this vLLM: look whether its seam is still needed, then write the patch, "
            f"or the seam, anew\n{done.stderr}"
        )
    return to


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tree(patch, ...)`: a vLLM with these patches; once each."""
    root = tmp_path_factory.mktemp("vllm")
    return functools.cache(lambda *patches: patched_vllm(root / "-".join(p.stem[:4] for p in patches), list(patches)))


# --- the patches and the register ------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", FILES, ids=lambda p: p.stem)
def test_a_patch_applies_and_says_what_it_is_for(patch: Path, tree: Callable[..., Path]) -> None:
    before = {file: (VLLM.parent / file).read_bytes() for file in patched_files([patch])}
    found = tree(patch)
    for file, text in before.items():
        assert (VLLM.parent / file).read_bytes() == text != (found / file).read_bytes()
        compile((found / file).read_text(encoding="utf-8"), str(file), "exec")
    head, _, diff = patch.read_text(encoding="utf-8").partition("\n--- a/")
    releases = " and ".join(f"{release}.0" for release in patching.RELEASES)
    assert diff and head.startswith("[") and f"Against vLLM {releases}." in head
    assert "steer" not in patch.read_text(encoding="utf-8").lower(), "upstream knows nothing of this project"


def test_the_patches_apply_together(tree: Callable[..., Path]) -> None:
    tree(*FILES)


def test_a_patch_against_another_vllm_fails_with_the_remedy(tmp_path: Path) -> None:
    drifted = tmp_path / FILES[0].name
    drifted.write_text(FILES[0].read_text(encoding="utf-8").replace("import threading", "import thread"))
    with pytest.raises(AssertionError, match="does not apply to this vLLM: look whether its seam is still needed"):
        patched_vllm(tmp_path / "tree", [drifted])


def test_the_register_the_seams_and_the_files_agree() -> None:
    rows = register()
    assert list(rows) == [*NAMES, *OF_TREES]
    assert [patch_of(name) for name in NAMES] == FILES
    plain = lambda text: text.replace("`", "")  # noqa: E731
    for seam, row in zip(seams.SEAMS, rows.values(), strict=True):
        assert row["runner"].lower().startswith(seam.runner)
        assert (plain(row["why"]), plain(row["remove when"])) == (seam.why, seam.remove_when)
        if seam.part:
            continue
        place = getattr(seam.upstream, "args", ("",))[0]  # the kernel's is not a name: its result is looked at
        assert place in row["what the plugin looks for"]


# --- which way every seam is taken -----------------------------------------------------------------------------------

# vLLM's imports apart from these take two seconds; a fork for each vLLM saves ten each time.
ASK = """
import importlib, json, os, sys
for name in ("torch._inductor.lowering", "transformers.models.auto.image_processing_auto", "openai.types.responses",
             "transformers.modeling_gguf_pytorch_utils", "scipy.signal", "cv2", "fastapi", "aiohttp", "xgrammar"):
    importlib.import_module(name)
for tree in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        sys.path.insert(0, tree)
        import vllm.v1.worker.gpu_model_runner, vllm.v1.worker.gpu.model_runner
        from vllm_steer.serving import register
        from vllm_steer.serving import patches as seams, patching
        assert os.path.dirname(os.path.dirname(vllm.__file__)) == tree, vllm.__file__
        assert set(patching.ways().values()) <= {"not imported", "replaced", "upstream"}, patching.ways()
        register()
        patching.require(v2=False, part="trees")
        patching.require(v2=True, part="trees")
        patching.require(v2=False, part="blocks")
        patching.require(v2=True, part="blocks")
        patching.require(v2=False, part="lenience")
        patching.require(v2=True, part="lenience")
        taken = patching.ways()
        patching.undo()
        print(json.dumps([taken, list(patching.ways().values())]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="session")
def ways(tree: Callable[..., Path]) -> dict[str, dict[str, str]]:
    """How every seam is taken in the installed vLLM, "stock", with each patch alone, by file name, and with "all"."""
    trees = {"stock": VLLM.parent, "all": tree(*FILES)} | {patch.name: tree(patch) for patch in FILES}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, trees.values())],
        env=os.environ | engines.ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert all(set(undone) == {"not imported"} for _, undone in answers)
    return dict(zip(trees, [taken for taken, _ in answers], strict=True))


@pytest.mark.parametrize("name", [*NAMES, *OF_TREES])
def test_the_seam_is_still_needed(name: str, ways: dict[str, dict[str, str]]) -> None:
    """When this fails, the installed vLLM has its own way: remove the replacement, its row and its patch."""
    assert ways["stock"][name] == "replaced", f"vLLM needs no {name} any more: the seam can be removed"


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_alone_makes_its_own_seam_needless(name: str, ways: dict[str, dict[str, str]]) -> None:
    assert ways[patch_of(name).name] == {n: "upstream" if n == name else "replaced" for n in [*NAMES, *OF_TREES]}


def test_all_patches_make_every_seam_needless(ways: dict[str, dict[str, str]]) -> None:
    assert ways["all"] == dict.fromkeys(NAMES, "upstream") | dict.fromkeys(OF_TREES, "replaced")


# --- engines ---------------------------------------------------------------------------------------------------------


def answer(runner: engines.Runner, model: str, **env: str) -> dict[str, Any]:
    """Greedy, and sampled with seeds and several temperatures, by one engine of the trained pair."""
    lines = (TINY / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    prompts = [[byte + 3 for byte in json.loads(line)["prompt"].encode()][:90] for line in lines]
    sampled = [{"temperature": 0.4 + 0.3 * i, "seed": i, "max_tokens": 24} for i in range(len(prompts))]
    calls = [{"prompts": prompts, "sampling": {"max_tokens": 24}}, {"prompts": prompts, "sampling": sampled}]
    found = runner.run(
        TINY / "target",
        {"model": str(TINY / model), "num_speculative_tokens": 4},
        calls,
        env,
        max_num_batched_tokens=512,
    )
    assert found["error"] is None, f"{found['error']}\n{found['log'][-6000:]}"
    return found


@pytest.fixture(scope="module")
def patched(tree: Callable[..., Path]) -> Iterator[Callable[[str], engines.Runner]]:
    """`patched("v1")`, `patched("v2")`: as `runners`, with every patch applied."""
    live: dict[str, engines.Runner] = {}

    def get(name: str) -> engines.Runner:
        if name not in live:
            path = os.pathsep.join(map(str, (tree(*FILES), ROOT, SUPPORT)))
            live[name] = engines.Runner(name, __file__, PYTHONPATH=path)
        return live[name]

    yield get
    for runner in live.values():
        runner.close()


@pytest.mark.parametrize("name", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_patched_engine_drafts_the_same(name: str, patched: Any, runners: Any) -> None:
    upstream, replaced = answer(patched(name), "steered"), answer(runners(name), "steered")
    assert {full for full, way in upstream["ways"].items() if way == "replaced"} <= set(OF_TREES)
    for full, seam in zip(NAMES, seams.SEAMS, strict=False):
        assert upstream["ways"][full] == "upstream" or seam.runner not in ("both", name), full
    for mine, theirs in zip(upstream["calls"], replaced["calls"], strict=True):
        engines.assert_steered(mine, {4})
        assert (mine["blocks"], mine["tokens"]) == (theirs["blocks"], theirs["tokens"])


@pytest.mark.parametrize("name", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_patched_engine_drafts_in_its_own_groups(name: str, patched: Any, runners: Any, tmp_path: Path) -> None:
    """Both layers of the drafter in groups of their own, none of them the first, and another window."""
    target, drafter, _ = pairs.make_pair(tmp_path)
    sliding, full = "sliding_attention", "full_attention"
    pairs.change_config(target, layer_types=[sliding, full] * 3 + [sliding], sliding_window=32)
    pairs.change_config(drafter, layer_types=[sliding, full], sliding_window=16)
    prompts = [pairs.random_prompt(n, seed=n) for n in (5, 75)]
    spec = {"model": str(drafter), "num_speculative_tokens": 4}
    mine, theirs = (r(name).generate(target, spec, prompts, max_tokens=16) for r in (patched, runners))
    alone = runners(name).generate(target, None, prompts, max_tokens=16)
    assert (mine["blocks"], mine["tokens"]) == (theirs["blocks"], theirs["tokens"])
    assert mine["tokens"] == alone["tokens"]


def test_a_patched_front_end_refuses_with_a_sentence(patched: Any) -> None:
    spec = {"model": str(TINY / "steered"), "num_speculative_tokens": 4, "parallel_drafting": True}
    found = patched("v1").run(TINY / "target", spec, [])
    assert "a steered drafter does not work with parallel drafting yet" in found["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_patched_engine_steers_only_what_is_to_be_steered(name: str, patched: Any, runners: Any) -> None:
    steered = answer(patched(name), "steered")
    for model, env in (("drafter", {}), ("steered", {"STEER_DISABLE": "1"})):
        mine, theirs = answer(patched(name), model, **env), answer(runners(name), model, **env)
        assert mine["calls"] == theirs["calls"]
        assert mine["calls"][0]["blocks"] != steered["calls"][0]["blocks"]
        assert not any(any(block["rows"]) for block in mine["calls"][0]["rounds"])


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """As engine_process.serve_job, and "ways": how the engine's process took every seam."""
    return engine_process.serve_job(job) | {"ways": patching.ways()}


if __name__ == "__main__":
    engine_process.main(serve_job)
