"""The drawings of the two-dimensional flows: readable in greyscale, and from the back of a room."""
import io

from matplotlib import colormaps
from matplotlib.figure import Figure                       # without pyplot: no window, and nothing to close
from PIL import Image

EDGE = 5.2                # of every panel, in the data's units
DARK = "#123f77"


def panels(rows, columns, size=3.2):
    """-> (figure, axes [rows, columns]): square panels without ticks."""
    page = Figure(figsize=(columns * size, rows * size + 0.6), layout="constrained")
    axes = page.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    return page, axes


def inks(colours, n):
    """A colour a point: dark blue, or by number in [0, 1), of different lightness too."""
    return [DARK] * n if colours is None else colormaps["plasma"](colours.numpy())


def coupling(truth, colours, rows, titles, path, lines=120):
    """One row a flow, (name, way [steps + 1, n, 2], its two numbers, [(samples [n, 2], number)]): noise joined to its end,
    the way between, and samples over the true points -> a PNG. titles: of the columns."""
    page, axes = panels(len(rows), 2 + len(rows[0][3]))
    ink = inks(colours, len(truth))
    for row, (name, way, numbers, samples) in enumerate(rows):
        few = way[:, :lines]
        for panel, points in zip(axes[row], (few[[0, -1]], few)):
            for i in range(lines):
                panel.plot(*points[:, i].T, color=ink[i], lw=0.9, alpha=0.6)
            panel.scatter(*few[0].T, s=16, color="white", edgecolors="0.45", zorder=3)
            panel.scatter(*few[-1].T, s=16, color=ink[:lines], zorder=3)
        for panel, (points, _) in zip(axes[row, 2:], samples):
            panel.scatter(*truth.T, s=9, color="0.82", lw=0)
            panel.scatter(*points.T, s=5, color=ink, lw=0)
        axes[row, 0].set_ylabel(name, fontsize=24)
        for panel, title, number in zip(axes[row], titles, [*numbers, *(number for _, number in samples)]):
            panel.set_title(f"{title}\n{number}" if row == 0 else number, fontsize=19)
    page.savefig(path, dpi=75)


def particles(truth, colours, rows, path, frames=40, points=700):
    """The same noise carried by each flow, side by side, with a pause at the end -> a GIF."""
    page, axes = panels(1, len(rows))
    clouds, pictures = [], []
    for panel, (_, way, *_) in zip(axes[0], rows):
        panel.scatter(*truth.T, s=9, color="0.85", lw=0)
        panel.plot(*way[:, :60].unbind(2), color="0.6", lw=0.6)
        clouds.append(panel.scatter(*way[0, :points].T, s=9, color=inks(colours, len(truth))[:points], lw=0))
    for frame in range(frames + 1):
        for panel, (name, way, *_), cloud in zip(axes[0], rows, clouds):
            now = round(frame * (len(way) - 1) / frames)
            cloud.set_offsets(way[now, :points])
            panel.set_title(f"{name}, t = {now / (len(way) - 1):.2f}", fontsize=19)
        buffer = io.BytesIO()
        page.savefig(buffer, dpi=80)
        pictures.append(Image.open(buffer).convert("RGB").quantize(32))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[60] * frames + [2000], loop=0)
