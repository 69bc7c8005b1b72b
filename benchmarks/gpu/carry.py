"""Take large files to a machine that accepts small ones only: cut here, joined and compared there.

    python benchmarks/gpu/carry.py cut wheels/*.whl --into pieces            # pieces of at most 60 MiB and a manifest
    python benchmarks/gpu/carry.py join pieces --into wheels                 # there, once all have arrived

The manifest has the SHA-256 of every file. A missing piece and a file that arrived changed are errors by name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

PIECE = 60 * 2**20
MANIFEST = "manifest.json"


def cut(files: list[Path], into: Path, size: int = PIECE) -> None:
    """Write the pieces of `files` and their manifest."""
    into.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for file in files:
        digest, pieces = hashlib.sha256(), []
        with file.open("rb") as source:
            while data := source.read(size):
                digest.update(data)
                pieces.append(f"{file.name}.{len(pieces):03}")
                (into / pieces[-1]).write_bytes(data)
        manifest[file.name] = {"sha256": digest.hexdigest(), "pieces": pieces}
    (into / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def join(pieces: Path, into: Path) -> None:
    """Make the files of a manifest again. Raises ValueError for a missing piece and for a changed file."""
    into.mkdir(parents=True, exist_ok=True)
    for name, found in json.loads((pieces / MANIFEST).read_text(encoding="utf-8")).items():
        if missing := [piece for piece in found["pieces"] if not (pieces / piece).is_file()]:
            raise ValueError(f"{name}: {', '.join(missing)} did not arrive in {pieces}: carry them again")
        digest = hashlib.sha256()
        with (into / name).open("wb") as whole:
            for piece in found["pieces"]:
                data = (pieces / piece).read_bytes()
                digest.update(data)
                whole.write(data)
        if digest.hexdigest() != found["sha256"]:
            (into / name).unlink()
            raise ValueError(f"{name} is not what was cut (its SHA-256 differs): carry its pieces again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    cutting = verbs.add_parser("cut")
    cutting.add_argument("files", type=Path, nargs="+")
    joining = verbs.add_parser("join")
    joining.add_argument("pieces", type=Path)
    for verb in (cutting, joining):
        verb.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    try:
        cut(args.files, args.into) if args.verb == "cut" else join(args.pieces, args.into)
    except (OSError, ValueError) as error:
        sys.exit(f"carry: {error}")


if __name__ == "__main__":
    main()
