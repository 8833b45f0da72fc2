"""Packs the emoji images of npm's emoji-datasource-google 16.0.0 into one file: data.py emoji.npz [--tarball FILE]

Images are Google's Noto emoji, Apache-2.0; the package around them is MIT. The pack holds 64-pixel images on white, a
class for each (the package's subcategory), the names of classes and categories, and which images are held out: whole
emoji with all their skin tones, so that what is held out has no twin among what is trained on.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "emoji-datasource-google@16.0.0"
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
SIZE = 64
HELD_OUT = 0.06
SPLIT_SEED = 20240916
# What --category takes, for the package's names.
CATEGORIES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}


def fetch():
    """The package's tarball by npm, checked."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (tarball,) = Path(folder).glob("*.tgz")
        return tarball.read_bytes()


def read(tarball):
    if base64.b64encode(hashlib.sha512(tarball).digest()).decode() != SHA512:
        raise SystemExit(f"the tarball is not that of {PACKAGE}")
    files, wanted = {}, f"package/img/google/{SIZE}/"
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        for member in archive:
            if member.name.startswith(wanted) or member.name == "package/emoji.json":
                files[member.name.removeprefix(wanted)] = archive.extractfile(member).read()
    return json.loads(files.pop("package/emoji.json")), files


def on_white(png):
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    assert image.size == (SIZE, SIZE)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def pack(emoji, files):
    emoji = sorted((e for e in emoji if e["category"] in CATEGORIES), key=lambda e: e["sort_order"])
    classes = sorted(
        {(list(CATEGORIES).index(e["category"]), e["subcategory"].replace(" & ", "-").replace(" ", "-")) for e in emoji}
    )
    held_out = np.random.default_rng(SPLIT_SEED).random(len(emoji)) < HELD_OUT
    images, labels, out = [], [], []
    for at, e in enumerate(emoji):
        label = classes.index(
            (list(CATEGORIES).index(e["category"]), e["subcategory"].replace(" & ", "-").replace(" ", "-"))
        )
        for entry in [e, *e.get("skin_variations", {}).values()]:
            if entry["has_img_google"] and entry["image"] in files:
                images.append(on_white(files[entry["image"]]))
                labels.append(label)
                out.append(held_out[at])
    return {
        "images": np.stack(images),
        "labels": np.array(labels, np.int64),
        "held_out": np.array(out),
        "class_names": np.array([name for _, name in classes]),
        "class_categories": np.array([category for category, _ in classes]),
        "categories": np.array(list(CATEGORIES.values())),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tarball", type=Path, help="the package, if it was fetched before")
    args = parser.parse_args()
    packed = pack(*read(args.tarball.read_bytes() if args.tarball else fetch()))
    np.savez_compressed(args.out, **packed)
    counts = np.bincount(packed["class_categories"][packed["labels"]])
    print(
        len(packed["images"]),
        "images,",
        int(packed["held_out"].sum()),
        "held out;",
        len(packed["class_names"]),
        "classes",
    )
    print(dict(zip(packed["categories"].tolist(), counts.tolist())))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
