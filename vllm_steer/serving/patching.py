"""The mechanism of replacing things in vLLM: one `Seam` each, applied when its module is imported, undone, asked for.

The table of seams is in patches.py. Where vLLM has a place of its own for the purpose (see patches/ in the repository),
that is used and nothing is replaced.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import wrapt

from vllm_steer.common.errors import SteeringError
from vllm_steer.serving.kill_switch import KILL_SWITCH

logger = logging.getLogger("vllm.steer")

RELEASES = ("0.32", "0.33")  # docs/support.md says what was tested on each
WORKS_WITH = " and ".join(RELEASES)
UNTESTED = "STEER_UNTESTED_VLLM"  # an environment variable: the one further release to steer on all the same
Undo = Callable[[], None]
_ABSENT = object()  # a place of vLLM's may well hold None


@dataclass(frozen=True)
class Seam:
    """One replacement: attribute `name` (dotted) of `module` becomes `make(original)`, unless `upstream` is there."""

    module: str
    name: str
    make: Callable[[Any], Any]
    upstream: Callable[[], Undo | None]  # takes vLLM's own way, if it has one; returns how to leave it, or None
    why: str
    remove_when: str
    needs: tuple[str, ...] = ()  # of vLLM, as "module:name": what our side relies on, by either way
    runner: str = "both"  # "both", "v1" or "v2"
    required: bool = True  # False: a repair of vLLM's own, nothing steering depends on
    part: str = ""  # "trees", "blocks", "medusa" or "lenience": these depend on it, nothing else
    alarm: str = ""  # logged when it cannot be applied; the others are asked for by `require`


# --- values of Seam.upstream ----------------------------------------------------------------------------------------


def join(place: str, hook: Callable[..., Any]) -> Undo | None:
    """vLLM's own way is a list at `place`, "module:name", of functions that it calls."""
    if (hooks := _find(place)) is _ABSENT:
        return None
    hooks.append(hook)
    return lambda: hooks.remove(hook)


def asked(place: str) -> Undo | None:
    """vLLM's own way is to ask a class, ours or its own: upstream supports this if `place` resolves."""
    return None if _find(place) is _ABSENT else _nothing


def sound(works: Callable[[], bool]) -> Undo | None:
    """vLLM's own way is its function as it stands, once that gives the right result."""
    return _nothing if works() else None


def never() -> None:
    """vLLM has no way of its own."""


def _find(place: str) -> Any:
    try:
        return resolve_name(place)
    except (ImportError, AttributeError):
        return _ABSENT


def _nothing() -> None:
    pass


# --- values of Seam.make ---------------------------------------------------------------------------------------------


def late(place: str) -> Callable[..., Any]:
    """The function at `place`, "module:name", imported when it is called: in workers only."""
    return lambda *args, **kwargs: resolve_name(place)(*args, **kwargs)


def through(module: str, function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Calls go to a function of `module` first, if something in this process has imported that."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if (found := sys.modules.get(module)) is None:
                return original(*args, **kwargs)
            return getattr(found, function)(original, *args, **kwargs)

        return replaced

    return make


def seams_of(part: str, runner: str, places: dict[str, Callable[[Any], Any]], why: str, remove_when: str) -> list[Seam]:
    """The seams of one part on one runner: what is made of each place of vLLM's, "module:name"."""
    return [
        Seam(module, name, make, never, why, remove_when, runner=runner, required=False, part=part)
        for place, make in places.items()
        for module, name in [place.split(":")]
    ]


# --- applying -------------------------------------------------------------------------------------------------------

_table: tuple[Seam, ...] = ()  # what was installed
_problems: dict[Seam, str] = {}
_applied: dict[Seam, tuple[str, Undo]] = {}  # which way was taken, and how to go back


def install(seams: tuple[Seam, ...]) -> None:
    """Apply every seam, or take vLLM's own way, now or when its module is imported. Repeatable."""
    global _table
    _table = seams
    for seam in seams:
        wrapt.register_post_import_hook(functools.partial(_apply, seam), seam.module)


def undo() -> None:
    """Put every original back, and leave every place of vLLM's own (tests)."""
    while _applied:
        _applied.popitem()[1][1]()


def ways() -> dict[str, str]:
    """Of every seam, "module:name", how it is taken: "replaced", "upstream" (vLLM has a way of its own, nothing is
    replaced), "not imported", or what is wrong with it."""
    return {
        f"{seam.module}:{seam.name}": _problems.get(seam) or _applied.get(seam, ("not imported",))[0] for seam in _table
    }


def known(version: str) -> bool:
    """Whether the seams support this release of vLLM."""
    return any(f"{version}.".startswith(f"{release}.") for release in RELEASES)


def reach(seam: Seam) -> None:
    """Import the module of a seam, so that it applies; what is wrong with the module is kept for `ways`."""
    try:
        importlib.import_module(seam.module)
    except ImportError as error:
        _problems[seam] = f"{seam.module} cannot be imported ({error})"


def require(v2: bool, part: str = "") -> None:
    """Raise SteeringError unless vLLM is a known release and every seam the chosen model runner needs is in place, with
    those of `part`."""
    import vllm

    remedy = f"install one of these, or set {KILL_SWITCH}=1 to serve the drafter unsteered"
    if not known(vllm.__version__):  # names may stay while their meaning moves
        _require_consent(vllm.__version__, remedy)
    for seam in _table:
        needed = seam.required or (bool(part) and seam.part == part)
        if not needed or seam.runner not in ("both", "v2" if v2 else "v1"):
            continue
        reach(seam)
        if seam not in _applied or seam in _problems:
            raise SteeringError(
                f"this vLLM ({vllm.__version__}) has no place for steering: "
                f"{_problems.get(seam, f'{seam.module}:{seam.name} was not replaced')}. vllm-steer works with vLLM "
                f"{WORKS_WITH}: {remedy}"
            )


def _require_consent(version: str, remedy: str) -> None:
    """Raise SteeringError unless UNTESTED names this very release: consent to one is not consent to the next."""
    if os.environ.get(UNTESTED) != version:
        raise SteeringError(
            f"this is vLLM {version}, vllm-steer works with {WORKS_WITH}: {remedy}. {UNTESTED}={version} steers all "
            "the same, at your risk: vLLM may have changed what steering relies on without renaming it, and then "
            "acceptance falls, or the output is no longer the target's"
        )
    logger.warning(
        "steering on vLLM %s, which vllm-steer was not tested with (%s is set): compare the output with the "
        "target's own, and the acceptance with the checkpoint's",
        version,
        UNTESTED,
    )


def _apply(seam: Seam, module: ModuleType) -> None:
    if seam in _applied:
        return
    try:
        for name in seam.needs:
            resolve_name(name)
        if (undone := seam.upstream()) is not None:
            _applied[seam] = "upstream", undone
        else:
            _applied[seam] = "replaced", _replace(seam, module)
    except Exception as error:  # an exception in an import hook would break unsteered engines too
        _problems[seam] = f"{seam.module}:{seam.name} is not as expected ({type(error).__name__}: {error})"
        if seam.alarm:
            logger.warning("%s: %s. vllm-steer works with vLLM %s", seam.alarm, _problems[seam], WORKS_WITH)
        logger.debug("seam not applied: %s", _problems[seam])
        return
    _problems.pop(seam, None)
    logger.debug("seam %s:%s: %s", seam.module, seam.name, _applied[seam][0])


def _replace(seam: Seam, module: ModuleType) -> Undo:
    owner, _, attribute = seam.name.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = holder.__dict__[attribute]
    setattr(holder, attribute, seam.make(original))
    return functools.partial(setattr, holder, attribute, original)
