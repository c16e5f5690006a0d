"""The report as a file: complete, escaped, and loading nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, FidelityError, ManifestError, RunFolderError
from kolotune.foundation.hashing import hash_file
from kolotune.report import facts, page
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import MarkState, write_mark

from .conftest import HOSTILE, comparison, with_changes

_VOID = {"meta", "br"}


class Elements(HTMLParser):
    """All elements with their attributes, all text, and the elements that are still open."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_plain_run(finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    html = page.render(facts.gather_facts(run))
    parsed = Elements(html)
    text = " ".join(parsed.text.split())
    for fact in (
        "tiny, tuned on 3 chats from chats.jsonl",
        "Loss at the last step",
        "no chats were held out",
        "Every chat was used as it is.",
        f"kolotune compare {run.root.name}",
        "What is 0 plus 1?",
        hash_file(run.gguf)[:12],
    ):
        assert fact in text, fact
    assert "passed" not in text  # it was not compared
    marked = re.findall(r"<mark>(.*?)</mark>", html, re.DOTALL)
    assert marked == ["It is 1.&lt;|im_end|&gt;\n"] or marked == ["It is 1.&lt;|im_end|&gt;"]
    assert [tag for tag, _ in parsed.elements].count("svg") == 6 + len(facts.gather_facts(run).manifest.artifacts) - 1
    assert json.loads(html[html.index("<pre>{") + 5 : html.index("}</pre>") + 1].replace("&#34;", '"'))["format"] == 1


def test_the_same_run_gives_the_same_page(finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    assert page.render(facts.gather_facts(run)) == page.render(facts.gather_facts(run))


def test_an_up_to_date_page_is_left_alone(run_copy: RunFolder) -> None:
    page.write(run_copy)
    written = run_copy.report.stat().st_mtime_ns
    page.write(run_copy)
    assert run_copy.report.stat().st_mtime_ns == written
    run_copy.report.write_text("an old page", encoding="utf-8")
    page.write(run_copy)
    assert run_copy.report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_nothing_in_the_run_becomes_markup(hostile_run: RunFolder) -> None:
    html = page.write(hostile_run).read_text(encoding="utf-8")
    parsed = Elements(html)
    assert parsed.open == []
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2", "h3", "h4",
        "p", "dl", "dt", "dd", "div", "span", "strong", "mark", "code", "pre", "ul", "li", "table", "thead", "tbody",
        "tr", "th", "td", "br", "figure", "figcaption", "details", "summary",
        "svg", "g", "defs", "path", "use", "text", "clippath", "rect",
    }  # fmt: skip
    assert {tag for tag, _ in parsed.elements} <= allowed
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("style", "src")}
    links = [value for _, attributes in parsed.elements for name, value in attributes.items() if name == "href"]
    assert links and all(value and value.startswith("#") for value in links)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "␛[31mred␇ ⟨U+202E⟩abc⟨U+2066⟩ 日本 🎉" in parsed.text
    # It is shown as text everywhere: chat, answers, failure, findings, bad chats, options, versions and more.
    assert parsed.text.count("<script>window.hurt = 1</script>") > 20
    assert "{{ 7 * 7 }}" in parsed.text
    for sentence in ("2 exact copies of other chats were left out", "4 whole turns at their ends", "3 bad chats"):
        assert sentence in " ".join(parsed.text.split())


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(hostile_run: RunFolder) -> None:
    html = page.render(facts.gather_facts(hostile_run))
    policy = next(attributes["content"] for _, attributes in Elements(html).elements if "http-equiv" in attributes)
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert html.count("<style") == 1
    assert "url(" not in style and "@import" not in style
    assert set(re.findall(r"https?://[^\"'<> ]+", html)) <= {"http://www.w3.org/2000/svg"}
    # Charts have no fixed colours, only properties that both colour schemes set.
    assert not re.search(r"(fill|stroke): #", style)
    assert not re.search(r'(fill|stroke)="#', html)


@pytest.mark.parametrize("passed", [True, False])
def test_the_comparison(passed: bool, hostile_run: RunFolder) -> None:
    result = comparison("words")
    if passed:
        result = with_changes(result, failure=None)
    result.write(hostile_run.comparison)
    text = " ".join(Elements(page.render(facts.gather_facts(hostile_run))).text.split())
    assert ("every stage is within its bounds" in text) == passed
    assert ("The first stage that fails is quantize" in text) == (not passed)
    for fact in (
        "8.0e-07",
        "50.0 %",
        "8/9",
        "Q8_0 (with an importance matrix) recommended",
        "prose 3.250 3.375",
        "all 1/1 0/1",
    ):
        assert fact in text, fact
    sides = re.findall(
        r"<h4>(.*?)</h4><div class=\"text\" dir=\"auto\">(.*?)</div>", page.render(facts.gather_facts(hostile_run))
    )
    assert sides == [("Before", "words"), ("After", "words"), ("In the chats", "words"), ("After", "(empty)")]
    hostile_run.comparison.write_text("{}")
    with pytest.raises(ArtifactError, match="is not a comparison"):
        page.write(hostile_run)


def test_a_comparison_is_shown_when_it_is_of_these_results(hostile_run: RunFolder) -> None:
    values = json.loads(hostile_run.manifest.read_text())
    del values["artifacts"][hostile_run.relative(hostile_run.comparison)]
    hostile_run.manifest.write_text(json.dumps(values))
    assert facts.gather_facts(hostile_run).comparison is None  # it may belong to another training
    write_mark(hostile_run, "compare", MarkState.FAILED, "words")
    shown = facts.gather_facts(hostile_run).comparison
    assert shown is not None and shown.failure is not None
    values["stages"]["train"]["finished"] = "2999-01-01T00:00:00+00:00"  # trained again since
    hostile_run.manifest.write_text(json.dumps(values))
    assert facts.gather_facts(hostile_run).comparison is None


def test_a_run_that_is_not_finished(run_copy: RunFolder, kolotune: Callable[..., tuple[int, str]]) -> None:
    run_copy.manifest.unlink()
    code, output = kolotune("report", run_copy.root)
    assert code == ManifestError.exit_code and "there is no manifest" in output
    assert not run_copy.report.exists()
    code, output = kolotune("report", run_copy.root.parent)
    assert code == RunFolderError.exit_code


def test_a_run_ends_with_its_page(run_copy: RunFolder, kolotune: Callable[..., tuple[int, str]]) -> None:
    call = ("run", "--config", run_copy.config, "--output-dir", run_copy.root)
    code, output = kolotune(*call)
    assert code == 0 and "report: report.html" in output, output
    assert run_copy.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.render(facts.gather_facts(run_copy)) == run_copy.report.read_text(encoding="utf-8")
    run_copy.report.unlink()
    run_copy.metrics.write_text("{")  # a report that can't be written does not make the run fail
    code, output = kolotune(*call)
    assert code == 0 and "report: report.html" not in output and "metrics.jsonl:1" in output
    assert not run_copy.report.exists()


@pytest.mark.slow
def test_a_comparison_that_fails_is_on_the_page(run_copy: RunFolder, kolotune: Callable[..., tuple[int, str]]) -> None:
    """A Modelfile has a different template, and the record says that it was made so."""
    for file in (run_copy.modelfile(), run_copy.modelfile("Q4_K_M")):
        file.write_text(file.read_text().replace("<|im_start|>user", "<|im_start|>someone"))
        record = json.loads(run_copy.record("modelfile").read_text())
        record["outputs"][file.name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
        record.pop("sha256", None)  # of the record as it was
        run_copy.record("modelfile").write_text(json.dumps(record))
    code, output = kolotune("compare", run_copy.root)
    assert code == FidelityError.exit_code and "report: report.html" in output, output
    text = " ".join(Elements(run_copy.report.read_text(encoding="utf-8")).text.split())
    assert "The first stage that fails is modelfile" in text
    code, output = kolotune("verify", run_copy.root)  # the files are those of the records all the same
    assert code == 0, output


def test_many_steps_are_thinned_out_but_the_last_one_is_kept(hostile_run: RunFolder) -> None:
    lines: list[dict[str, float]] = [{"step": step, "loss": 1.0} for step in range(1, 10_001)]
    lines[-1]["loss"] = 0.5
    hostile_run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = facts.gather_facts(hostile_run).curve
    assert curve is not None and len(curve.steps) < 4000
    assert (curve.steps[-1], curve.losses[-1], curve.held_out) == (10_000, 0.5, [])
    assert len(curve.smooth()) == len(curve.steps)


def test_a_preference_training_has_a_chart_of_its_accuracies(hostile_run: RunFolder) -> None:
    lines: list[dict[str, float]] = [{"step": 0, "held_out_loss": 0.69, "held_out_accuracy": 0.25}]
    lines += [{"step": step, "loss": 0.5, "accuracy": step / 40} for step in range(1, 41)]
    lines += [{"step": 40, "held_out_loss": 0.3, "held_out_accuracy": 0.875}]
    hostile_run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads(hostile_run.manifest.read_text())
    record["stages"]["train"]["facts"] |= {"first_held_out_accuracy": 0.25, "held_out_accuracy": 0.875}
    hostile_run.manifest.write_text(json.dumps(record))
    gathered = facts.gather_facts(hostile_run)
    assert gathered.curve is not None and gathered.curve.held_out_accuracies == [(0, 0.25), (40, 0.875)]
    text = page.render(gathered)
    assert "held-out accuracy from 25% to 88%" in text and "loss of the objective" in text
    assert "Held-out accuracy" in text and "88 %" in text and "25 % before training" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[2J", "␛[2J"),
        ("\x7f\x9b", "⟨U+007F⟩⟨U+009B⟩"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_invisible_characters_are_shown(text: str, shown: str) -> None:
    assert page.show_invisible(text) == shown
    assert HOSTILE not in page.show_invisible(HOSTILE)
