"""The report, as its reader meets it: every sentence and number on one page that needs nothing else."""

import copy
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from dashboards import drawing, figures, report
from dashboards.comparison import check
from tests.support.comparison import comparison


class Reader(HTMLParser):
    """What a person sees of a page (its text, spaces collapsed), and the addresses that it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.fetched, self.tags, self.ids, self._hidden = [], [], set(), [], False
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self._hidden = tag == "style"
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith("#"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return report.render(comparison(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def reader(written: list[Path]) -> Reader:
    return Reader(written[0].read_text(encoding="utf-8"))


def read(changed: dict) -> Reader:
    return Reader(report.html(check(changed)))


def test_writes_a_page_and_its_pictures(written: list[Path]) -> None:
    pictures = ("final_perplexity", "perplexity_by_step", "gap_by_step", "perplexity_by_tokens", "perplexity_by_hours")
    names = {"report.html", *(f"{name}.png" for name in pictures)}
    assert {path.name for path in written} == names
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
                assert min(picture.size) > 300
                assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn


def test_the_answer_in_words_stands_before_figures_and_tables(reader: Reader) -> None:
    example = comparison()
    places = [
        reader.text.index(text)
        for text in (
            example["question"], *example["sentences"], "Final perplexity of each method", "What to do next",
            "Train longer python -m orchestrator.sweep --steps 80 --name 'a & b'", "Perplexity by optimiser step",
            "Results",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    for context in example["contexts"]:
        for sentence in context["sentences"]:
            assert sentence in reader.text


@pytest.mark.parametrize(
    "text",
    [
        "2.865 2.768 to 2.966",  # LoRA+ at 1,024 tokens, with its interval
        "+4.1% +3.2% to +5.0%",  # its gap to full fine-tuning
        "not reached",
        "+0.6% −0.2% to +1.4%",
        "from step 30",
        "2.213 → 2.302 at 512 tokens",
        "2,305",  # tokens per second
        "0.91 GiB",
        "1 min 5 s",
        "2 min 10 s",
        "0.003",
        "trains 1,092,864 parameters",
        "untuned, YaRN 2.986 2.867 to 3.105",
        "untuned, no change 1,843.2",
        "24 held-out documents, 49,152 scored tokens",
        "non-overlapping windows of the evaluation length inside documents",
        "2 CPU cores, AMD EPYC; at most 3.21 GiB",
        "longspan 0.1.0 at 63506cd, torch 2.13.0",
        "4 min 40 s",
        "sha256:41bb07",
        "python -m dashboards.mlflow --storage runs",
        "run20485",
        "LoRA rank 8, alpha 16, on the attention projections",
        "20 81,920",  # an evaluation: step and tokens
        "LoRA+ above Full fine-tuning Step Tokens Gap Interval 5 20,480",
        "Cost Setting CPU hours USD Tokens to 2.749 CPU hours to 2.749 Dominated by",
        "LoRA+ 0.0197 $0.04 129,024 0.0148 none",
        "LoRA 0.0181 $0.04 not reached not reached none",
        "Learning rates each method's by its final perplexity from a small grid",
        "Price given by the user",
    ],
)
def test_the_page_holds(reader: Reader, text: str) -> None:
    assert text in reader.text


def test_what_did_not_finish_says_why_and_where_its_log_is(reader: Reader) -> None:
    assert "2 of 9 trials did not finish" in reader.text
    assert (
        "Full fine-tuning at 4,096 tokens failed out of memory: 14.2 GiB asked for, 11.0 GiB free <at step 12> "
        "runs/trials/full-4096/log.txt" in reader.text
    )
    assert "LoRA+ at 4,096 tokens unfinished interrupted at step 25 of 40" in reader.text


def test_a_sweep_without_trouble_does_not_mention_any() -> None:
    calm = comparison()
    calm["contexts"].pop()
    assert "did not finish" not in read(calm).text


def test_the_page_needs_nothing_but_itself(written: list[Path], reader: Reader) -> None:
    page = written[0].read_text(encoding="utf-8")
    assert reader.fetched == []
    assert "script" not in reader.tags
    assert "@import" not in page and "url(http" not in page
    # Five figures of three contexts, drawn into the page; at the last one there is no gap to draw.
    assert page.count("<svg") == 14
    assert len(reader.ids) == len(set(reader.ids))


def test_figures_follow_the_pages_colours(written: list[Path]) -> None:
    page = written[0].read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "prefers-color-scheme: dark" in page
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", drawn)) == {
        *("--ink", "--muted", "--line"),
        *("--method-0", "--method-1", "--method-2"),
    }
    assert not re.search(r"#[0-9a-f]{6}", drawn)


def first_curves(page: Path) -> str:
    """The words of the first panel of curves."""
    panel = page.read_text(encoding="utf-8").split("<svg")[4]
    return " ".join(html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", panel))


def test_references_and_the_whole_descent_are_in_the_figure(written: list[Path]) -> None:
    words = first_curves(written[0])
    for label in ("untuned, YaRN 2.99", "untuned, no change 4.13", "untuned, linear interpolation 26.4"):
        assert label in words
    assert "off the chart" not in words


def test_a_start_that_would_flatten_everything_else_is_noted_as_off_the_chart(tmp_path: Path) -> None:
    steep = comparison()
    context = steep["contexts"][0]
    context["references"][1]["perplexity"] = 412.0
    for trial in context["trials"]:
        for point in trial["curve"][:1]:
            point.update(perplexity=412.0, low=400.0, high=420.0)
    words = first_curves(report.render(steep, tmp_path)[0])
    assert "off the chart: 412 at step 0; untuned, linear interpolation 412" in words


def test_an_interval_that_is_cut_at_the_edge_of_the_scale_has_an_arrow_there() -> None:
    cut, whole = comparison(), comparison()
    for each, high in ((cut, 1e6), (whole, None)):
        each["contexts"] = each["contexts"][:1]
        each["contexts"][0]["references"] = [{"label": "untuned", "perplexity": 3.0, "low": None, "high": high}]
    assert [figures.svg_panels(check(each), "final_perplexity")[0][1].count("→") for each in (cut, whole)] == [1, 0]


def test_what_is_reached_before_training_and_who_dominates_is_said_so() -> None:
    early = comparison()
    early["contexts"][0]["settings"][0] |= {
        "reached": {"step": 0, "tokens": 0, "hours": 0, "usd": 0}, "dominated": True, "dominated_by": "LoRA+",
        "above_lowest": {"percent": 11.1, "low": 10.2, "high": 12.0}, "against_untuned": None,
    }  # fmt: skip
    text = read(early).text
    assert "LoRA 0.0181 $0.04 before training 0 LoRA+" in text
    assert "Against the best and against no training Method Above Full fine-tuning LoRA +11.1% +10.2% to +12.0%" in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = comparison()
    name = "<script>alert('$x$ & \"y\"')</script>"
    hostile["model"]["name"] = hostile["question"] = hostile["data"]["name"] = name
    for context in hostile["contexts"]:
        context["trials"][0] |= {"method": name, "name": name, "state": "failed", "reason": name, "log": name}
        for each in (context["settings"][0], *context["gaps"][:1]):
            each["method"] = name
            each |= {"name": name} if "name" in each else {}
        context["references"][0]["label"] = name
    reader = Reader(report.render(hostile, tmp_path)[0].read_text(encoding="utf-8"))
    assert "script" not in reader.tags
    assert reader.text.count(name) > 10


def test_a_method_unknown_to_the_report_gets_a_colour_of_its_own() -> None:
    more = comparison()
    for index, name in enumerate(("dora", "prefix")):
        more["contexts"][0]["trials"].append(
            copy.deepcopy(more["contexts"][0]["trials"][0]) | {"method": name, "variant": name, "seed": index}
        )
    looks = figures.styles(more)
    assert len(set(looks.values())) == len(looks) == 5


def test_a_comparison_from_before_labels_is_shown_with_raw_names(tmp_path: Path) -> None:
    """As a sweep of commit b1875aa wrote it."""
    stored = Path(__file__).parents[1] / "data" / "b1875aa" / "sweeps" / "convergence" / "comparison.json"
    old = json.loads(stored.read_text())
    text = Reader(report.render(old, tmp_path)[0].read_text(encoding="utf-8")).text
    for name in ("lora+ 1024 trains", "lora+ above full", "lora+ lr 0.003"):
        assert name in text


def test_a_trial_that_was_stopped_early_is_no_trouble_and_says_at_which_step() -> None:
    stopped = comparison()
    stopped["contexts"].pop()
    stopped["contexts"][0]["trials"][0] |= {
        "state": "stopped", "last_step": 15, "final": None, "gap_to_full": None, "chosen": False,
        "reason": "at 61,440 tokens LoRA+ with 0.003 was at 3.2, below its 4.1",
    }  # fmt: skip
    text = read(stopped).text
    assert "did not finish" not in text
    assert "1 of 6 trials was stopped early and does not compete" in text
    assert "LoRA at 1,024 tokens , learning rate 0.003, stopped at step 15 at 61,440 tokens LoRA+ with" in text
    assert "stopped at step 15" in text


def test_of_many_curves_only_each_methods_best_setting_is_labelled() -> None:
    many = comparison()
    context = many["contexts"][0]
    context["settings"][0]["name"] = "LoRA lr 0.003"
    for rate in (1e-5, 3e-5, 1e-4, 3e-4):
        context["trials"].append(copy.deepcopy(context["trials"][0]) | {"name": f"LoRA lr {rate:g}", "chosen": False})
        context["settings"].append(
            copy.deepcopy(context["settings"][0]) | {"name": f"LoRA lr {rate:g}", "chosen": False}
        )
    panel = figures.svg_panels(many, "perplexity_by_step")[0][1]
    labels = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", panel)]
    assert [label for label in labels if label.startswith("LoRA lr")] == ["LoRA lr 0.003 3.08"]
    assert any(label.startswith("LoRA+ 2.") for label in labels)


def test_where_hours_cannot_be_compared_there_is_no_picture_of_them(tmp_path: Path) -> None:
    mixed = comparison()
    for context in mixed["contexts"]:
        context["hours_unit"] = None
        for each in [*context["trials"], *context["settings"]]:
            each |= {"hours": None, "dominated": None}
    assert "perplexity_by_hours.png" not in {path.name for path in report.render(mixed, tmp_path)}


def test_what_is_dominated_is_grey_in_the_picture() -> None:
    grey = comparison()
    before = figures.svg_panels(grey, "perplexity_by_hours")[0][1]
    grey["contexts"][0]["settings"][0]["dominated"] = True
    panel = figures.svg_panels(grey, "perplexity_by_hours")[0][1]
    assert "var(--method-0)" in before  # LoRA's colour
    assert "var(--method-0)" not in panel and "var(--method-1)" in panel


@pytest.mark.parametrize("contexts", [1, 2])
def test_every_trial_may_have_failed_before_its_first_evaluation(contexts: int) -> None:
    bare = comparison()
    bare["model"]["parameters"] = None  # it was never loaded
    bare["contexts"] = bare["contexts"][:contexts]
    for context in bare["contexts"]:
        for trial in context["trials"]:
            trial |= {"curve": [], "final": None, "gap_to_full": None, "state": "failed", "reason": None}
        context |= {"settings": [], "gaps": [], "target": None}
    assert read(bare).text.count("No reason was recorded.") == 3 * contexts


def test_a_diverged_trial_is_reported_and_drawn_as_far_as_it_goes() -> None:
    diverged = comparison()
    trial = diverged["contexts"][0]["trials"][0]
    trial["curve"][-1] |= {"perplexity": float("nan"), "low": None, "high": None}
    trial["curve"][-2] |= {"perplexity": float("inf"), "low": None, "high": None}
    trial["final"] = trial["curve"][-1]
    context = diverged["contexts"][0]
    context["settings"][0]["final"] = trial["final"]
    context["gaps"][0]["points"][-1] |= {"percent": float("nan"), "low": None, "high": None}
    context["gaps"][0]["points"][-2] |= {"percent": float("inf"), "low": float("nan"), "high": float("inf")}
    text = read(diverged).text
    assert "not a number" in text and "∞" in text


def test_a_perplexity_beyond_every_integer_is_drawn() -> None:
    """What a learning rate that is far too high ends with, which a search is bound to try."""
    huge = comparison()
    trial = huge["contexts"][0]["trials"][0]
    trial["curve"][-1] |= {"perplexity": 3e40, "low": 1e40, "high": 1e41}
    trial["final"] = trial["curve"][-1]
    assert "3.0×10⁴⁰" in read(huge).text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda it: it.pop("rule"), "comparison lacks 'rule'"),
        (
            lambda it: it["contexts"][1]["trials"][2].pop("method"),
            r"comparison\.contexts\[1\]\.trials\[2\] lacks 'method'",
        ),
        (lambda it: it["model"].update(parameters="many"), r"comparison\.model\.parameters should be a number.*'many'"),
        (lambda it: it.update(contexts=[]), r"comparison\.contexts is empty"),
        (lambda it: it.update(contexts={}), r"comparison\.contexts should be a list"),
        (
            lambda it: it["contexts"][0]["trials"][0].update(state="done"),
            r"trials\[0\]\.state should be one of finished",
        ),
    ],
)
def test_what_a_comparison_lacks_is_named(tmp_path: Path, spoil, message: str) -> None:
    spoilt = comparison()
    spoil(spoilt)
    with pytest.raises(ValueError, match=message):
        report.render(spoilt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_optional_values_may_be_left_out() -> None:
    sparse = comparison()
    del sparse["git_commit"], sparse["wall_seconds"], sparse["peak_memory_gib"]
    for trial in sparse["contexts"][0]["trials"]:
        for key in ("reason", "log", "tokens_per_second", "mlflow_run_id", "gap_to_full", "original_length"):
            del trial[key]
    assert "longspan 0.1.0, torch" in read(sparse).text


def test_the_same_comparison_gives_the_same_page(written: list[Path]) -> None:
    assert report.html(check(comparison())) == written[0].read_text(encoding="utf-8")


def test_labels_are_pushed_apart_and_stay_inside() -> None:
    places = drawing.spread([50.0, 50.1, 50.2, 99.0], [10, 10, 20, 10], height=100)
    assert all(after - before >= 9.9 for before, after in pairwise(places))
    assert places[2] - places[1] >= 14.9
    assert -6 <= places[0] and places[-1] <= 106


def test_the_command_writes_beside_the_comparison_or_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    assert report.main([str(tmp_path / "comparison.json")]) == 0
    assert (tmp_path / "report.html").exists()
    (tmp_path / "comparison.json").write_text("{}")
    command = [sys.executable, "-m", "dashboards.report", str(tmp_path / "comparison.json"), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2
    assert "comparison lacks 'sweep'" in ended.stderr and "Traceback" not in ended.stderr


def test_importing_the_room_is_quick() -> None:
    heavy = {"matplotlib", "mlflow", "jinja2", "torch", "ray"}
    code = f"import sys, dashboards.report, dashboards.mlflow; print({heavy} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.stdout.strip() == "set()"
