"""The HTML report of a saved memory: what it says, that it stands alone, and that a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemParams, SparseConfig, StorageError, label_errors
from lightning_resmem.params import Gate
from lightning_resmem.reporting.html_report import write_report
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.models import num_outputs, rows
from tests.saved_files import file_of

TASK_NAMES = sorted(TASKS)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What tests ask of a page: its text, its tags with attributes, and the rows of its tables."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.tables, self.open = "", [], [], []
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, heading):
        """The rows of the table that has a column of this name, without the headings."""
        (found,) = (table for table in self.tables if heading in table[0])
        return [[re.sub(r"\s+", " ", cell).strip() for cell in row] for row in found[1:]]


def filled(task="multiclass", count=200, **options):
    keys, targets = rows(count, seed=1, task=task)
    outputs = torch.randn(count, num_outputs(task), generator=torch.Generator().manual_seed(2))
    memory = LocalMemory(task=TASKS[task](), **{"params": ResMemParams(k=7, sigma=0.8), **options})
    memory.add(keys, outputs, targets, torch.arange(count) * 3 + 5)
    return memory


def report(memory, tmp_path, name="memory", **options):
    memory.save(tmp_path / name)
    html = write_report(tmp_path / name, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    return Page(html), html


@pytest.mark.parametrize("task", TASK_NAMES)
def test_page_stands_alone_and_is_accessible(task, tmp_path):
    page, html = report(filled(task), tmp_path)
    assert not re.search(r"""(?:src|href|url)\s*[=(]|@import|https?:""", html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img"
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in attributes or attributes[name] in ids
    assert ("html", {"lang": "en"}) in page.tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_summary(tmp_path):
    memory = filled(params=ResMemParams(k=7, sigma=0.25, strength=0.5, gate=Gate(distance=-1)))
    memory.provenance = {"head": "net.fc", "fingerprint": "0123456789abcdef0123"}
    page, _ = report(memory, tmp_path)
    text = re.sub(r"\s+", " ", page.text)
    for words in (
        "Rows 200",
        "Key width 4",
        "Outputs 4",
        "Task multiclass",
        "k 7",
        "sigma 0.25",
        "strength 0.5",
        "gate bias 0, distance -1, confidence 0",
        "Head net.fc",
        "Embedding the head's input",
        "Fingerprint 0123456789abcdef",
        "Index exact",
        "Files checksums match",
    ):
        assert words in text, words


def test_label_counts(tmp_path):
    memory = filled()
    page, _ = report(memory, tmp_path)
    counts = torch.bincount(memory.fetch(memory.ids).targets, minlength=4).tolist()
    assert page.table("class") == [[str(i), str(count)] for i, count in enumerate(counts)]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_histograms_count_every_row(task, tmp_path):
    page, _ = report(filled(task), tmp_path)
    for axis in ("Euclidean distance", "largest entry of a residual", "Euclidean norm"):
        assert sum(int(count) for _, count in page.table(axis)) == 200


def test_likely_label_errors_are_those_of_label_errors(tmp_path):
    memory = filled()
    page, _ = report(memory, tmp_path)
    ranked = label_errors(memory)
    shown = page.table("neighbours say")
    assert [int(row[0]) for row in shown] == ranked.ids[:20].tolist()
    assert [float(row[-1]) for row in shown] == pytest.approx(ranked.scores[:20].tolist(), abs=5e-4)
    values = memory.fetch(ranked.ids[:20])
    assert [row[1] for row in shown] == [str(int(label)) for label in values.targets]
    assert [row[3].split()[0] for row in shown] == [str(int(c)) for c in values.outputs.argmax(dim=1)]


def test_neighbours_of_rows(tmp_path):
    memory = filled()
    page, _ = report(memory, tmp_path, k=3)
    shown = page.table("nearest other rows: id, label, distance")
    assert len(shown) == 10
    for id, label, neighbors in shown:
        found = memory.search(memory._query_rows(torch.tensor([int(id)])), 4)
        labels = memory.fetch(found.ids[0]).targets
        assert label == str(int(labels[0]))
        wanted = [
            f"#{other}: {'' if name == int(label) else '≠ '}{name} ({distance:.4g})"
            for other, name, distance in zip(
                found.ids[0, 1:].tolist(), labels[1:].tolist(), found.distances[0, 1:].tolist(), strict=True
            )
        ]
        assert neighbors.split(" · ") == wanted


def test_notes(tmp_path):
    page, _ = report(filled(params=ResMemParams(strength=0)), tmp_path)
    assert "switched off" in page.text
    assert "not known which weights" in page.text
    memory = LocalMemory(params=ResMemParams())
    labels = torch.arange(40) % 4
    memory.add(torch.zeros(40, 2), 20 * torch.eye(4)[labels], labels)
    page, _ = report(memory, tmp_path, "other")
    assert "The base predicts the label of 100.0% of the rows" in page.text
    assert "this memory has little to add" in " ".join(page.text.split())
    assert "100.0% of the rows have the same key as another row" in page.text


@pytest.mark.parametrize(("k", "sigma"), [(1, 1.0), (3, 0.01), (40, 100.0)])
def test_the_share_of_the_neighbors_is_at_the_params_of_the_memory(k, sigma, tmp_path):
    keys, labels = torch.randn(60, 2), torch.randint(3, (60,))
    memory = LocalMemory(params=ResMemParams(k, sigma))
    memory.add(keys, torch.zeros(60, 3), labels)
    page, _ = report(memory, tmp_path)
    right = []
    for row in range(60):
        others = torch.arange(60) != row
        found = oracle.predict(
            *(keys[others], torch.zeros(59, 3), labels[others], keys[row : row + 1], torch.zeros(1, 3)),
            k=k,
            sigma=sigma,
        )
        right.append(found.knn.argmax() == labels[row].item())
    assert f"k and sigma, do for {np.mean(right):.1%}." in " ".join(page.text.split())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("task", TASK_NAMES)
def test_tiny_memories(task, count, tmp_path):
    page, _ = report(filled(task, count), tmp_path)
    assert ("The memory has only one row" in page.text) == (count == 1)


def test_samples_are_bounded_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_resmem.reporting.samples._READ_ROWS", 50)
    page, html = report(filled(), tmp_path, rows=20)
    assert "50 random rows of 200 rows; distances of 20 random rows." in " ".join(page.text.split())
    assert sum(int(count) for _, count in page.table("class")) == 50
    assert sum(int(count) for _, count in page.table("Euclidean distance")) == 20
    assert report(filled(), tmp_path, rows=20)[1] == html


@pytest.mark.parametrize(
    "options", [{"index": "IVF4,Flat"}, {"values": SparseConfig(top_m=2)}], ids=["faiss", "sparse"]
)
def test_other_kinds_of_memory(options, tmp_path):
    page, _ = report(filled(**options), tmp_path)
    assert ("IVF4,Flat" if "index" in options else "sparse") in page.text


def test_many_classes_are_a_histogram(tmp_path):
    memory = LocalMemory(params=ResMemParams())
    memory.add(torch.rand(120, 2), torch.zeros(120, 60), torch.arange(120) % 60)
    page, _ = report(memory, tmp_path)
    assert "Rows of a class" in page.text
    assert "All are 2." in page.text


def test_everything_is_escaped(tmp_path):
    memory = filled()
    memory.provenance = {"head": "<script>alert(1)</script>", "embedding": "a & b", "fingerprint": '">'}
    page, html = report(memory, tmp_path, "<b>&name")
    assert "<script" not in html
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert "<script>alert(1)</script>" in page.text
    assert "<b>&name" in page.text


def test_damage_is_noticed(tmp_path):
    directory = filled().save(tmp_path / "memory")
    keys = file_of(directory, "keys")
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    with pytest.raises(StorageError, match="sha256"):
        write_report(directory, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    page = Page(write_report(directory, tmp_path / "page.html", verify=False).read_text(encoding="utf-8"))
    assert "not checked" in page.text


def test_bad_arguments(tmp_path):
    with pytest.raises(StorageError, match="no such directory"):
        write_report(tmp_path / "missing", tmp_path / "page.html")
    directory = filled().save(tmp_path / "memory")
    with pytest.raises(InputError, match="rows=0"):
        write_report(directory, tmp_path / "page.html", rows=0)
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(directory, tmp_path)


def browse(page, tmp_path, size, *arguments):
    profile = tmp_path / "profile"
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
    more = ("disable-component-update", "disable-sync", f"user-data-dir={profile}", f"window-size={size}")
    command = [CHROMIUM, *(f"--{flag}" for flag in (*flags.split(), *more)), *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
def test_browser_shows_the_page(tmp_path):
    import matplotlib.image

    memory = filled()
    memory.provenance = {"head": "net.fc", "fingerprint": "0123456789abcdef" * 4}
    directory = memory.save(tmp_path / ("long-name-" * 8))
    page = write_report(directory, tmp_path / "page.html")
    for size in ("1200,1600", "360,1600"):
        picture = tmp_path / f"{size}.png"
        browse(page, tmp_path, size, f"--screenshot={picture}")
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape[0] == 1600
        bars = np.abs(pixels - np.array([0x3B, 0x6F, 0xD4]) / 255).max(axis=2) < 0.01
        assert bars.mean() > 0.005  # the charts are drawn
        assert (pixels.max(axis=2) < 0.3).mean() > 0.002  # so is the text

    # Nothing sticks out of a narrow screen: asked of the browser by a script, which the page's own policy would stop.
    html = page.read_text(encoding="utf-8")
    html = re.sub(r"<meta http-equiv[^>]*>", "", html)
    script = """const parts = [...document.querySelectorAll("dl, figure, header")];
        const cut = parts.filter(part => part.scrollWidth > part.clientWidth);
        document.title = `${document.documentElement.scrollWidth} of ${window.innerWidth}, ${cut.length} cut`"""
    (tmp_path / "asked.html").write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    for size in ("360,900", "1100,900"):
        answer = browse(tmp_path / "asked.html", tmp_path, size, "--dump-dom")
        ((needed, there, cut),) = re.findall(r"<title>(\d+) of (\d+), (\d+) cut</title>", answer)
        assert int(needed) <= int(there)
        assert int(cut) == 0
