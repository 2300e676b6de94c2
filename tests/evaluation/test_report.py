"""What a report says, in a terminal, a notebook, a figure and in JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advreg.evaluation.report import (
    INTERRUPTED,
    Accuracy,
    Check,
    RobustnessReport,
    in_words,
)
from advreg.evaluation.report import OF_EACH_FEATURE as EACH

pytestmark = pytest.mark.every_backend


def line(name="PGD-40", correct=30, examples=40, **kwargs):
    return Accuracy(name, correct, examples, **kwargs)


def report(**changes):
    ball = {"epsilon": 0.1, "norm": "infinity"}
    fields = {
        "model": "net",
        "clean": line("clean", 38, seconds=0.5),
        "results": (
            line("FGSM", 33, seconds=1.0, settings="FGSM(epsilon=0.1)", **ball),
            line(**ball, median_l2=1.23456, median_linf=0.1),
        ),
        "worst_cases": (line("worst case", 29, **ball),),
        "overall": line("overall", 29),
        "threat_model": "An input may move.",
        "checks": (Check("left_ball", True), Check("effort", None, "Not made.")),
        "seconds": 12.3,
    }
    return RobustnessReport(**{**fields, **changes})


# Fields


@given(st.data(), st.integers(1, 10**6))
def test_the_interval_is_wilsons(data, examples):
    correct = data.draw(st.integers(0, examples))
    expected = stats.binomtest(correct, examples).proportion_ci(method="wilson")
    low, high = line(correct=correct, examples=examples).interval
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= low <= correct / examples <= high <= 1


@pytest.mark.parametrize(("correct", "examples"), [(-1, 4), (5, 4), (0, 0)])
def test_no_more_can_be_correct_than_there_are(correct, examples):
    with pytest.raises(ValueError, match=r"`correct` .* Received: correct="):
        line(correct=correct, examples=examples)


def test_accuracies_are_shares_of_the_examples():
    made = report()
    assert made.examples == 40
    assert made.clean_accuracy == 38 / 40
    assert made.robust_accuracy == 29 / 40


def test_warnings_are_the_messages_of_failed_checks_alone():
    made = report(
        checks=(Check("a", True, "A"), Check("b", False, "B"), Check("c", None, "C"))
    )
    assert made.warnings == ("B",)


# In a terminal


def test_the_table_has_a_line_for_clean_data_each_attack_and_the_worst_case():
    lines = str(report()).split("\n")
    table = lines[2:8]
    assert [row.split("  ")[0] for row in table] == [
        "attack",
        "----------",
        "clean",
        "FGSM",
        "PGD-40",
        "worst case",
    ]
    assert table[4].split() == (
        ["PGD-40", "L∞", "0.1", "75.00", "%", "59.81–85.81", "%", "1.23", "0.1"]
    )
    assert "Robustness of 'net': 40 examples, 12.3 s" in lines[0]
    assert lines[-1] == "Checks of an honest evaluation: 1 made, no warning."


def test_of_one_attack_the_worst_case_is_no_news():
    assert "worst case" not in str(report(results=report().results[:1]))


def test_warnings_are_printed_in_88_columns():
    message = "The accuracy still falls as the attack works harder. " * 5
    made = report(
        model="n" * 60,
        complete=False,
        threat_model="An input may move. " * 10,
        checks=(Check("a", False, message),),
    )
    lines = str(made).split("\n")
    assert max(map(len, lines)) <= 88
    text = " ".join(" ".join(lines).split())
    assert message.strip() in text
    assert "interrupted before the end of the data" in text
    assert "no warning" not in text


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ((), "none could be made."),
        ((Check("a", None, "No."),), "none could be made."),
        (
            (Check("a", True), Check(INTERRUPTED, None, "Ctrl-C.")),
            "1 made, no warning, but interrupted before the others.",
        ),
    ],
)
def test_what_was_not_checked_is_not_called_honest(checks, said):
    assert str(report(checks=checks)).endswith(f"honest evaluation: {said}")


# In a notebook


def test_html_escapes_whatever_comes_from_outside():
    evil = "<img src=x onerror=alert(1)>"
    made = report(
        model=evil,
        threat_model=evil,
        results=(line(evil),),
        checks=(Check(evil, False, evil),),
    )
    text = made._repr_html_()
    assert "<img" not in text
    assert text.count("&lt;img") == 4


def test_html_lists_warnings_where_there_are_some():
    assert "<ul>" not in report()._repr_html_()
    warned = report(checks=(Check("a", False, "Beware."),))._repr_html_()
    assert "<ul><li>Beware.</li></ul>" in warned


# JSON

positive = st.none() | st.floats(0, 1e300)
accuracies = st.builds(
    lambda name, counts, epsilon, norm, seconds, settings, lengths: Accuracy(
        name, min(counts), max(counts), epsilon, norm, seconds, settings, *lengths
    ),
    st.text(),
    st.tuples(st.integers(0, 10**9), st.integers(1, 10**9)),
    positive,
    st.sampled_from([None, "l1", "l2", "infinity"]),
    positive,
    st.none() | st.text(),
    st.tuples(positive, positive),
)
reports = st.builds(
    RobustnessReport,
    st.text(),
    accuracies,
    st.lists(accuracies, max_size=3).map(tuple),
    st.lists(accuracies, max_size=3).map(tuple),
    accuracies,
    st.text(),
    st.lists(
        st.builds(Check, st.text(), st.sampled_from([True, False, None]), st.text()),
        max_size=3,
    ).map(tuple),
    st.floats(0, 1e9),
    st.booleans(),
)


@given(reports)
def test_a_report_survives_json(made):
    read = RobustnessReport.from_json(made.to_json())
    assert read == made
    assert str(read) == str(made)
    assert read._repr_html_() == made._repr_html_()


def changed(path, value):
    """JSON of a report of which one value is another."""
    data = json.loads(report().to_json())
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data)


HOSTILE = {
    "nothing": "",
    "no JSON": "{",
    "a number": "1",
    "a list": "[]",
    "null": "null",
    "nested": "[" * 100_000,
    "nested objects": '{"version":' * 100_000,
    "many digits": changed(["seconds"], 0).replace(
        '"seconds": 0', f'"seconds": {"9" * 5000}'
    ),
    "no text": None,
    "an object": {"version": 1},
    "another version": changed(["version"], 3),
    "no version": changed(["version"], ...),
    "field missing": changed(["clean"], ...),
    "field too many": changed(["extra"], 1),
    "accuracy without a field": changed(["clean", "correct"], ...),
    "accuracy with one too many": changed(["results", 0, "x"], 1),
    "count of text": changed(["clean", "correct"], "38"),
    "count with a fraction": changed(["clean", "correct"], 3.5),
    "count that is a bool": changed(["clean", "correct"], True),
    "count below nothing": changed(["clean", "correct"], -1),
    "more correct than there are": changed(["overall", "correct"], 41),
    "no examples": changed(["clean", "examples"], 0),
    "count of all atoms": changed(["clean", "examples"], 10**80),
    "NaN": changed(["results", 0, "epsilon"], math.nan),
    "infinity": changed(["results", 0, "median_l2"], math.inf),
    "float beyond all": changed(["seconds"], 1).replace(
        '"seconds": 1', '"seconds": 1e999'
    ),
    "integer beyond all": changed(["results", 0, "epsilon"], 10**400),
    "negative radius": changed(["results", 0, "epsilon"], -0.1),
    "radius of text": changed(["results", 0, "epsilon"], "0.1"),
    "unknown norm": changed(["results", 0, "norm"], "l3"),
    "norm of another type": changed(["results", 0, "norm"], ["l2"]),
    "results of text": changed(["results"], "abc"),
    "results of nothing": changed(["results"], None),
    "results in an object": changed(["results"], {"name": 1}),
    "result of rubbish": changed(["results", 0], [[{"a": [None]}]]),
    "check of text": changed(["checks", 0], "passed"),
    "check that is 1": changed(["checks", 0, "passed"], 1),
    "message of a number": changed(["checks", 0, "message"], 7),
    "model of a number": changed(["model"], 7),
    "complete of text": changed(["complete"], "yes"),
    "complete of nothing": changed(["complete"], None),
    "time of nothing": changed(["seconds"], None),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"`text` must be what .* Received: ") as info:
        RobustnessReport.from_json(text)
    assert len(str(info.value)) < 1000


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(sorted(json.loads(report().to_json()))),
)
def test_rubbish_in_any_field_is_refused_or_is_a_report(value, name):
    try:
        read = RobustnessReport.from_json(changed([name], value))
    except ValueError:
        return
    assert RobustnessReport.from_json(read.to_json()) == read


def test_the_words_of_the_json_are_the_fields():
    assert set(json.loads(report().to_json())) == {
        "version",
        *(field.name for field in dataclasses.fields(RobustnessReport)),
    }


# Figures


def drawn(ax):
    return {
        text.get_text(): [tuple(point) for point in line.get_xydata()]
        for text, line in zip(ax.get_legend().get_texts(), ax.get_lines(), strict=True)
    }


def test_a_report_draws_accuracy_against_radius():
    curves = drawn(report().plot())
    assert curves == {
        "FGSM, L∞": [(0, 95), (0.1, 82.5)],
        "PGD-40, L∞": [(0, 95), (0.1, 75)],
        "worst case, L∞": [(0, 95), (0.1, 72.5)],
    }


def test_a_report_draws_into_axes_that_it_is_given():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert report().plot(ax=ax) is ax
    assert len(ax.get_lines()) == 3


def test_a_figure_of_its_own_has_a_title():
    ax = report(model="of_$x$" + 80 * "n", complete=False).plot()
    title = ax.get_title()
    assert title.startswith(r"Robustness of 'of_\$x\$nn")
    assert "40 examples, interrupted" in title.replace("\n", " ")
    ax.figure.canvas.draw()  # Which reads formulae.


def test_every_norm_has_a_line_of_its_own():
    results = (
        line(epsilon=0.1, norm="infinity"),
        line(epsilon=1.0, norm="l2"),
        line("ART DeepFool"),
    )
    curves = drawn(report(results=results, worst_cases=()).plot())
    assert set(curves) == {"PGD-40, L∞", "PGD-40, L2"}


def test_without_a_radius_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match=r"`reports` must hold an attack with a rad"):
        report(results=(line(),), worst_cases=()).plot()


# The threat model


def words(radii, ranges, white_box=("PGD-40",), black_box=(), unbounded=()):
    return in_words(
        radii, ranges, white_box=white_box, black_box=black_box, unbounded=unbounded
    )


def test_the_threat_model_names_balls_range_and_knowledge():
    assert words({"infinity": 0.3, "l2": 2.0}, {("0", "1")}) == (
        "An input may move up to 0.3 in the L∞ norm or up to 2 in the L2 norm, inside "
        "the range from 0 to 1. The attacker knows the model and the labels (PGD-40)."
    )


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({("", "")}, ", and take any value."),
        ({("0", "")}, ", inside the range from 0 to ∞."),
        ({("", "255")}, ", inside the range from -∞ to 255."),
        ({("0", EACH)}, ", inside the range from 0 to that of each feature."),
        ({(EACH, EACH)}, ", inside the range of each feature."),
        ({("0", "1"), ("", "")}, ", inside the range of each attack, which are not"),
    ],
)
def test_the_threat_model_names_the_range(ranges, said):
    assert said in words({"l2": 0.3}, ranges)


def test_the_threat_model_names_what_has_no_radius():
    text = words({"l2": 0.3}, {("0", "1")}, (), ["Square"], ["ART DeepFool"])
    assert "The attacker knows" not in text
    assert "Without the model's own gradient: Square." in text
    assert "Without a radius: ART DeepFool;" in text
    assert words({}, {("0", "1")}, (), (), ["ART DeepFool"]) == (
        "An input may move any distance, inside the range from 0 to 1."
    )
