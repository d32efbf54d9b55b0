from __future__ import annotations

import struct
from html.parser import HTMLParser

import pytest

from bmojo.compare.report import losses, summary_table, write_report
from bmojo.figures import STYLES
from bmojo.presets import COMPARED

VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes, headings and text, and checks that tags nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.headings, self.words, self.open = set(), [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def only(results, suite):
    results["models"] = [model for model in results["models"] if model["suite"] == suite]
    if suite == "recall":
        results["corpus"] = None
    return results


def report(tmp_path, results):
    write_report(tmp_path, results)
    html = (tmp_path / "report.html").read_text("utf-8")
    return html, Page(html), (tmp_path / "report.md").read_text("utf-8")


def test_html_is_one_file_and_markdown_finds_its_figures(tmp_path, results):
    html, page, markdown = report(tmp_path, results)
    links = [value for _, key, value in page.attributes if key in ("src", "href", "srcset", "style")]
    assert len(links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "http" not in html
    assert "url(" not in html
    figures = sorted((tmp_path / "figures").iterdir())
    assert [figure.stem for figure in figures] == ["by_position", "cost", "loss", "recall"]
    for figure in figures:
        data = figure.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20])[0] > 1000
        assert f"](figures/{figure.name})" in markdown


def test_sections_are_in_order(tmp_path, results):
    _, page, markdown = report(tmp_path, results)
    assert page.headings == [
        "Text suite",
        "Training loss",
        "Bits per byte by position",
        "Recall",
        "Cost by context",
        "Where each model loses",
        "What the eidetic memory keeps",
        "How it is measured",
    ]
    headings = [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
    assert headings == [heading for heading in page.headings if "eidetic" not in heading]
    assert "\n\n\n" not in markdown


def test_the_values_are_in_the_tables(tmp_path, results):
    _, page, markdown = report(tmp_path, results)
    words = " ".join(page.words)
    for shown in ("1.589 [1.578, 1.600]", "6,012,000", "9,900", "858 MiB", "made-up stories", "Example CPU", "seed 17"):
        assert shown in words
        assert shown in markdown
    assert "equal within 0.971 % (the run allows 2 % around its target)" in words
    assert ("td", "class", "best") in page.attributes
    assert ("td", "class", "worst") in page.attributes


def test_summary_table_marks_best_and_worst(tmp_path, results):
    table = summary_table(results)
    text, recall, costs = table.strip().split("\n\n")
    rows = {line.split("`")[1]: line for line in text.splitlines()[2:]}
    assert list(rows) == [name for name in STYLES if name in COMPARED]
    assert "| **1.589 [1.578, 1.600]** | 3,100 ▼ |" in rows["bmojo"]
    assert "1.668 [1.657, 1.679] ▼" in rows["swa"]
    assert "length 2,048, 16 pairs<br>beyond the training length<br>chance 6.2 %" in recall
    markdown = report(tmp_path, results)[2]
    assert all(part in markdown for part in (text, recall, costs))


def test_costs_of_the_recall_suite_are_losing_cells_too(results):
    metrics = {loss.metric for lost in losses(results).values() for loss in lost}
    assert any(metric.startswith("recall suite: ") for metric in metrics)
    assert not any(
        loss.metric.startswith("recall suite: ")
        for lost in losses({**results, "models": [m for m in results["models"] if m["suite"] == "recall"]}).values()
        for loss in lost
    )


def test_losing_cells_are_listed_for_bmojo_too(results):
    lost = losses(results)
    assert list(lost) == [name for name in STYLES if name in COMPARED]
    bmojo = {loss.metric: loss for loss in lost["bmojo"]}
    speed = bmojo["training tokens/s"]
    assert (speed.text, speed.best_text, speed.best_preset) == ("3,100", "9,900", "swa")
    assert speed.factor == pytest.approx(9900 / 3100)
    assert "bits per byte" not in bmojo
    assert "decode ms/token at context 256" in bmojo
    for entries in lost.values():
        factors = [loss.factor for loss in entries]
        assert factors == sorted(factors, reverse=True)
        assert all(factor > 1 for factor in factors)


def test_differences_within_noise_are_no_losses(results):
    lost = {preset: {loss.metric for loss in entries} for preset, entries in losses(results).items()}
    assert "bits per byte" not in lost["bmojo_f"]  # the intervals overlap
    assert "bits per byte" in lost["transformer"]
    assert "training tokens/s" not in lost["transformer"]  # less than 10 % slower than swa
    assert "training tokens/s" in lost["hybrid"]
    assert "0.972 ▼" not in summary_table(results)  # the worst inside the window, yet by less than 0.05
    assert not any("inside the window" in metric for metrics in lost.values() for metric in metrics)
    assert any("beyond the window" in metric for metric in lost["swa"])


def test_an_accuracy_of_zero_is_infinitely_worse(tmp_path, results):
    results["models"][8]["eval"]["recall"][2]["accuracy"] = 0.0
    assert losses(results)["swa"][0].factor == float("inf")
    assert "| ∞ |" in report(tmp_path, results)[2]


@pytest.mark.parametrize(
    ("suite", "absent"),
    [("text", {"Recall"}), ("recall", {"Text suite", "Bits per byte by position", "What the eidetic memory keeps"})],
)
def test_a_missing_suite_leaves_its_sections_out(tmp_path, results, suite, absent):
    _, page, markdown = report(tmp_path, only(results, suite))
    assert not absent & set(page.headings)
    assert {"Training loss", "Cost by context", "Where each model loses"} <= set(page.headings)
    assert not any(f"## {heading}" in markdown for heading in absent)
    assert "Corpus" in page.words if suite == "text" else "Corpus" not in page.words


def test_unfinished_and_unmeasured_models_leave_gaps(tmp_path, results):
    del results["models"][9:13]  # recall: only transformer, swa and bmojo
    del results["models"][6]["memory_sample"]
    results["models"][1]["decode"] = []
    results["models"][2]["train"]["loss"] = []
    results["models"][8]["eval"]["recall"] = []
    _, page, markdown = report(tmp_path, results)
    assert "What the eidetic memory keeps" not in page.headings
    assert "–" in page.words
    assert "6,012,000 to" not in markdown


def test_no_models_at_all(tmp_path, results):
    _, page, markdown = report(tmp_path, {**results, "models": []})
    assert page.headings == ["How it is measured"]
    assert "No model has finished." in markdown
    assert not (tmp_path / "figures").exists()


def test_one_model_alone_is_neither_best_nor_worst(tmp_path, results):
    results["models"] = results["models"][:1]
    _, page, _ = report(tmp_path, results)
    assert not {("td", "class", "best"), ("td", "class", "worst")} & set(page.attributes)
    assert losses(results) == {"transformer": []}


def test_an_unknown_preset_comes_last(tmp_path, results):
    results["models"][0]["preset"] = "another"
    assert list(losses(results))[-1] == "another"
    report(tmp_path, results)


def test_hostile_text_is_escaped_and_blanks_are_visible(tmp_path, results):
    sample = results["models"][6]["memory_sample"]
    sample["text"][:3] = ["<script>alert(1)</script>", ' "><img src=x>', "\n\t&"]
    results["name"] = "<script>name</script>"
    html, page, _ = report(tmp_path, results)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert(1)</script>" in page.words
    assert '·"><img·src=x>' in page.words
    assert "↵\n⇥&" in page.words


def test_kept_tokens_are_boxed_and_shaded_by_rank(tmp_path, results):
    sample = results["models"][6]["memory_sample"]
    sample["text"] = ["a", " b", " c", " d"]
    sample["layers"] = [{"layer": 2, "innovation": [0.1, 90.0, 0.2, 0.1], "kept": [1]}]
    _, page, _ = report(tmp_path, results)
    assert "bmojo, layer 2: 1 of 4 tokens kept" in page.words
    classes = [value for tag, key, value in page.attributes if tag == "span" and key == "class"][-4:]
    assert classes == ["s0", "s7 kept", "s5", "s0"]
