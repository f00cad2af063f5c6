"""report.html and arrays.npz: projections against oracles, a self-contained repeatable page."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments.report import arrays, html, maps, plots, schema
from experiments.report.example import example

VOID = {"meta", "br", "img", "input", "hr", "link"}


@pytest.fixture(scope="module")
def made():
    report, data = example(tasks=6)
    return report, arrays.check(data)


@pytest.fixture(scope="module")
def page(made):
    return html.render(*made)


class Structure(HTMLParser):
    """Open tags, identifiers, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.sources = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for k, v in attrs if k in ("href", "xlink:href")]
        self.sources += [v for k, v in attrs if k == "src"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_self_contained_and_complete(page, made):
    structure = Structure(page)
    assert structure.open == []
    assert len(set(structure.ids)) == len(structure.ids)
    assert not structure.sources and "<script" not in page and "@import" not in page
    for link in structure.links:
        assert link.startswith(("#", "data:")), link
        assert not link.startswith("#") or link[1:] in structure.ids, link
    text = " ".join(structure.text)
    for claim in made[0]["claims"]:
        assert claim["text"].replace(" %", "\u00a0%") in text
    for task in made[0]["table"]:
        assert task in text
    for svg in page.split("<svg")[1:]:
        ET.fromstring("<svg" + svg[: svg.index("</svg>") + 6])


def test_failures_are_shown_as_failures(page, made):
    for mark, verdict in zip("✓✗○", schema.VERDICTS, strict=True):
        claims = [c for c in made[0]["claims"] if c["verdict"] == verdict]
        assert page.count(f"{mark} {verdict}") == len(claims)
    worse = dict(made[0], claims=[dict(c, verdict=schema.FAILS) for c in made[0]["claims"]])
    assert html.render(worse, {}).count("✗ does not hold") == len(made[0]["claims"])


def test_equal_input_gives_equal_bytes(page, tmp_path):
    report, data = example(tasks=6)
    schema.write(tmp_path / "r.json", report)
    for name in ("a.npz", "b.npz"):
        arrays.save(tmp_path / name, **data)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    command = ["--json", str(tmp_path / "r.json"), "--npz", str(tmp_path / "a.npz")]
    assert html.main([*command, "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page


def test_names_are_escaped(made):
    report = dict(made[0])
    nasty = '<b>"a" & b</b>'
    report["table"] = {nasty: next(iter(report["table"].values()))}
    report["notes"], report["curves"] = [nasty], {nasty: {"step": [1, 2], "value": [1.0, 0.5]}}
    report["confusion"] = {"labels": [nasty], "matrix": [[1.0]]}
    text = html.render(report, {})
    assert nasty not in text and "&lt;b&gt;" in text
    assert Structure(text).open == []


def test_what_was_not_measured_is_said_so(made):
    report = dict(made[0], unseen={}, steps={}, curves={}, audit={})
    text = html.render(report, {})
    assert text.count("Not measured in this run") == 6


def test_pca_matches_the_svd_of_the_points(made):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 5)) * [5, 3, 1, 1, 1]
    kind = np.asarray([arrays.TRAINED] * 12 + [arrays.GENERATED] * 8)
    path = rng.normal(size=(1, 4, 5))
    data = {"gram": x @ x.T, "kind": kind, "trajectory_cross": path @ x.T}
    got = arrays.pca(data)
    mean = x[:12].mean(0)
    _, s, vt = np.linalg.svd(x[:12] - mean, full_matrices=False)
    for points, found in ((x - mean, got.points), (path[0] - mean, got.paths[0])):
        want = points @ vt[:2].T
        sign = np.sign((want * found).sum(0))
        np.testing.assert_allclose(found * sign, want, atol=1e-8)
    np.testing.assert_allclose(got.explained, s[:2] ** 2 / (s**2).sum(), atol=1e-10)
    # Mutation: fitted on all adapters, generated ones would bend the axes.
    other = arrays.pca(data | {"kind": np.zeros(20, int)})
    assert not np.allclose(np.abs(other.points), np.abs(got.points), atol=1e-2)


def test_tsne_keeps_tasks_together_and_repeats(made):
    data = made[1]
    start = arrays.pca(data).points
    first, again = arrays.tsne(data, start), arrays.tsne(data, start)
    np.testing.assert_array_equal(first, again)
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (data["task"][distance.argmin(1)] == data["task"]).mean() > 0.95


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gram": ...}, "group adapters lacks gram"),
        ({"task": np.zeros(3, int)}, r"arrays\.task: shape \(3,\), expected \(72,\)"),
        ({"nn_generated": np.asarray([np.nan])}, r"nn_generated: has values"),
        ({"extra": np.zeros(1)}, r"arrays\.extra: unknown"),
        ({"trajectory_cross": np.zeros((2, 3, 4))}, r"trajectory_cross: shape"),
        ({"task": np.full(72, 9)}, r"task: outside 0\.\.5"),
        ({"kind": np.full(72, 1)}, "fewer than 3 trained"),
    ],
)
def test_bad_arrays_are_refused(made, tmp_path, change, match):
    data = {k: v for k, v in (made[1] | change).items() if v is not ...}
    with pytest.raises(schema.ReportError, match=match):
        arrays.save(tmp_path / "a.npz", **data)
    assert not list(tmp_path.iterdir())


def test_bad_files_end_with_one_clear_line(made, tmp_path, capsys):
    schema.write(tmp_path / "r.json", made[0])
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    command = ["--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.html")]
    for extra in (["--npz", str(tmp_path / "a.npz")], ["--npz", str(tmp_path / "none.npz")]):
        with pytest.raises(SystemExit) as stop:
            html.main([*command, *extra])
        assert stop.value.code == 2
        assert ".npz" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_many_tasks_are_numbered_and_few_are_named():
    few = maps.confusion([f"task-{i}" for i in range(5)], np.eye(5))
    many = maps.confusion([f"task-{i}" for i in range(70)], np.eye(70))
    assert "task-3" in few and "task-3" not in many and ">70<" in many


def test_step_ticks_do_not_touch():
    assert plots._apart([2, 4, 5, 10, 12, 20, 1000]) == [2, 4, 10, 20, 1000]
