"""The drawings, of experiments and of the flows in the plane: readable in greyscale, and from the back of a room."""
import io
import textwrap
from itertools import cycle

from matplotlib import colormaps
from matplotlib.figure import Figure                       # without pyplot: no window, and nothing to close
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from PIL import Image

from checkpoint import write_by

# Colours that the colour-blind tell apart too (Okabe and Ito 2008); line and marker tell the same without any.
STYLES = [dict(color=colour, marker=marker, linestyle=line) for colour, marker, line in zip(
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"), "os^DvPX",
    ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (8, 2)), "-"))]
LEVEL = dict(color="0.35", marker="*", linestyle=":")      # what there is to compare with

EDGE = 5.2                # of every panel of a flow in the plane, in the data's units
DARK = "#123f77"


# --- experiments ---

def curves(lines, panels, path, level=None, notes=()):
    """lines: {name: [(x, y) of each panel]}, panels: [what Axes.set takes] -> a PNG. level: the name of the line that
    is no model but something to compare with. notes: what stands beside each point of a line."""
    page = Figure(figsize=(1.2 + 6.6 * len(panels), 6.6), layout="constrained")
    for k, (panel, words) in enumerate(zip(page.subplots(1, len(panels), squeeze=False)[0], panels)):
        for (name, drawn), style in zip(lines.items(), cycle(STYLES)):
            x, y = drawn[k]
            panel.plot(x, y, label=name, lw=2.4, ms=10, markevery=max(1, len(x) // 10),
                       **(LEVEL if name == level else style))
            for point in zip(notes, x, y):
                panel.annotate(point[0], point[1:], (8, 6), textcoords="offset points", fontsize=13)
        panel.set(**words)
        panel.title.set_size(15)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set_size(16)
            if axis.get_scale() == "log":                  # 10, 20, 50, in place of powers
                axis.set_major_locator(axis.get_major_locator() if isinstance(axis.get_major_locator(), FixedLocator)
                                       else LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter("{x:g}")
        panel.tick_params(labelsize=14)
        panel.grid(color="0.9")
    page.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(panels), fontsize=14,
                handlelength=4)
    write_by(page.savefig, path, dpi=90)


def sheet(rows, labels, columns, title, path):
    """Rows of PIL images, labelled at the left and on top -> a PNG."""
    page = Figure(figsize=(2.6 + 1.9 * len(columns), 1.3 + 1.95 * len(rows)), layout="compressed")
    axes = page.subplots(len(rows), len(columns), squeeze=False)
    for line, row, label in zip(axes, rows, labels):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=15)
        for panel, image in zip(line, row):
            panel.imshow(image, interpolation="lanczos")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    for panel, column in zip(axes[0], columns):
        panel.set_title(textwrap.fill(column, 18), fontsize=14)
    page.suptitle(title, fontsize=15)
    write_by(page.savefig, path, dpi=75, bbox_inches="tight")


# --- the flows in the plane ---


def panels(rows, columns, size=3.2):
    """-> (figure, axes [rows, columns]): square panels without ticks."""
    page = Figure(figsize=(columns * size, rows * size + 0.6), layout="constrained")
    axes = page.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    return page, axes


def inks(colours, n):
    """One colour per point: dark blue, or by number in [0, 1), differing in lightness too."""
    return [DARK] * n if colours is None else colormaps["plasma"](colours.numpy())


def coupling(truth, colours, rows, titles, path, lines=120):
    """One row a flow, (name, way [steps + 1, n, 2], its two numbers, [(samples [n, 2], number)]): noise joined to its
    end, the way between, and samples over the true points -> a PNG. titles: of the columns."""
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
    write_by(page.savefig, path, dpi=75)


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
    write_by(pictures[0].save, path, save_all=True, append_images=pictures[1:], duration=[60] * frames + [2000], loop=0)
