import numpy as np
import torch
from PIL import Image

from images import grid, to_pil


def test_to_pil_by_hand():
    image, = to_pil(torch.tensor([-1.0, 0.0, 1.0, -3.0, 3.0, 1 / 127.5])
                    .reshape(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert [p[0] for p in np.array(image)[0]] == [0, 128, 255, 0, 255, 128]  # 127.5 rounds to even, 128; 128.5 too


def test_a_grid_shows_every_picture_in_its_place():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (90, 90, 90)]]
    sheet = grid([[Image.new("RGB", (16, 16), c) for c in row] for row in colours],
                 ["first", "second"], ["a", "b"], side=32)
    pixels = np.array(sheet)
    found = {c: np.argwhere((pixels == c).all(2)).mean(0) for row in colours for c in row}
    for row in colours:
        assert found[row[0]][0] == found[row[1]][0] and found[row[1]][1] - found[row[0]][1] == 38
    assert found[colours[1][0]][0] - found[colours[0][0]][0] == 38
    assert (pixels[:, :100] < 128).any() and (pixels[:94] < 128).any()       # words at the left and on top
