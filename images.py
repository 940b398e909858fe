"""What a model draws, as pictures: tensors as PIL images, and labelled grids of them."""
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cli import UserError


def finite(images):
    """The images, if all their values are numbers: others would be drawn black, and FID would measure that.
    Raises UserError."""
    if not images.isfinite().all():
        raise UserError("the pictures came out as no numbers; give a guidance nearer to 1, another --dtype, "
                        "or other weights: these may be damaged, or their training diverged")
    return images


def to_pil(images):
    """[B, 3, H, W] in [-1, 1] -> list of PIL images. Raises UserError as `finite` does."""
    pixels = (((finite(images).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
              .permute(0, 2, 3, 1).cpu().numpy())
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def grid(rows, labels=None, columns=None, side=192):
    """Rows of PIL images as one picture, enlarged to `side` px where smaller: labels, one a row, at the left, and
    columns, one a column, on top (wrapped)."""
    side = max(side, rows[0][0].width)
    high = round(side * rows[0][0].height / rows[0][0].width)
    font, left, top = ImageFont.load_default(15), 150 if labels else 0, 94 if columns else 0
    sheet = Image.new("RGB", (left + (side + 6) * max(map(len, rows)), top + (high + 6) * len(rows)), "white")
    write = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image.resize((side, high), Image.Resampling.LANCZOS),
                        (left + j * (side + 6), top + i * (high + 6)))
        if labels:
            write.multiline_text((8, top + i * (high + 6) + high // 2),
                                 "\n".join(textwrap.fill(line, 17) for line in labels[i].splitlines()),
                                 "black", font, anchor="lm")
    for j, column in enumerate(columns or []):
        lines = textwrap.wrap(column, side // 8)
        write.multiline_text((left + j * (side + 6) + side // 2, top - 6), "\n".join(lines[:4]), "black", font,
                             anchor="md", align="center")
    return sheet
