"""Draws the sample bucket out of the Open Clip Art tars: the same pictures on every run."""

import argparse
import csv
import re
import shutil
import unicodedata
from pathlib import Path

from openclipart import Picture, read_corpus, split_of

LICENCES = {"public domain": "CC0-1.0"}
LARGEST_BUCKET = 20_000_000  # bytes

LICENCE_NOTE = """\
The pictures and captions in this folder come from the Open Clip Art Library, release 0.18.
Their authors dedicated them to the public domain; the library's terms name the Creative Commons
public domain dedication, written here as CC0-1.0 (https://creativecommons.org/publicdomain/zero/1.0/).
Every picture drawn carries the licence field "public domain" in the source data.

Pictures over 512 px or 60 kB were scaled down and stored as JPEG when the source data was made;
here all bytes are as in that data. Captions are the titles exactly as their authors left them:
empty, shared by a whole collection, or wrong.
"""


def safe_folder(path: str) -> str:
    """Folds a library path's folder to lower-case ASCII letters, digits, '-', '_' and '/'."""
    folder = path.rpartition("/")[0]
    plain = unicodedata.normalize("NFKD", folder).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9/_-]+", "_", plain.lower())


def object_name(picture: Picture) -> str:
    """The picture's place, relative to the bucket's root."""
    return f"images/{safe_folder(picture.path)}/{picture.key}.{picture.suffix}"


def write_bucket(corpus: Path, out: Path) -> tuple[int, int]:
    """Replaces `out` by pictures, `captions.csv` and a note; returns (pictures, bytes)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = []
    for picture in read_corpus(corpus):
        if split_of(picture.key) != "sample":
            continue
        name = object_name(picture)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(picture.data)
        keywords = ";".join(picture.keywords)
        rows.append((name, picture.title, LICENCES[picture.licence], keywords))
    with (out / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file_name", "caption", "licence", "keywords"))
        writer.writerows(sorted(rows))
    (out / "LICENSE.txt").write_text(LICENCE_NOTE, encoding="utf-8")
    return len(rows), sum(f.stat().st_size for f in out.rglob("*") if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder with the WebDataset tars")
    parser.add_argument("out", type=Path, help="the bucket's folder; replaced")
    arguments = parser.parse_args()
    count, size = write_bucket(arguments.corpus, arguments.out)
    print(f"{count} pictures, {size / 1e6:.1f} MB")
    if size > LARGEST_BUCKET:
        raise SystemExit(f"over {LARGEST_BUCKET / 1e6:.0f} MB: lower SAMPLE_SHARE")


if __name__ == "__main__":
    main()
