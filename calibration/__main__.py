"""The command `python -m calibration`: writes samples as a contact sheet or as a folder."""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from calibration.layouts import SPLITS
from calibration.tasks import Sample, samples


def contact_sheet(chosen: list[Sample], columns: int = 8) -> Image.Image:
    """All samples on one picture, each above its question and answer."""
    cell_width, cell_height = 344, 440
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (128, 128, 128))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, sample in enumerate(chosen):
        x, y = i % columns * cell_width, i // columns * cell_height
        sheet.paste(sample.image, (x, y))
        if sample.box is not None:
            x0, y0, x1, y1 = sample.box
            draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline=(255, 0, 255))
        draw.text((x + 2, y + 396), f"{sample.prompt}\n{sample.answer}", (255, 255, 255), font)
    return sheet


def write_folder(chosen: list[Sample], folder: Path) -> None:
    """PNG files and samples.jsonl with the keys image, prompt and answer."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as lines:
        for i, sample in enumerate(chosen):
            name = f"{i:05d}.png"
            sample.image.save(folder / name)
            record = {"image": name, "prompt": sample.prompt, "answer": sample.answer}
            lines.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m calibration", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="calibration")
    parser.add_argument("-n", "--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a .png (contact sheet) or a folder"
    )
    arguments = parser.parse_args()
    chosen = list(samples(arguments.split, arguments.count, arguments.seed))
    if arguments.output.suffix == ".png":
        contact_sheet(chosen).save(arguments.output)
    else:
        write_folder(chosen, arguments.output)


if __name__ == "__main__":
    main()
