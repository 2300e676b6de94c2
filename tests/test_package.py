import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import pytest

import advreg

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_public_names():
    assert advreg.__all__ == [
        "AdvNeighborConfig",
        "AdvRegConfig",
        "AdversarialRegularization",
        "NormType",
        "Objective",
        "RobustnessReport",
        "__version__",
        "adversarial_loss",
        "attacks",
        "callbacks",
        "evaluate_robustness",
        "gen_adv_neighbor",
        "make_adv_reg_config",
    ]
    assert all(hasattr(advreg, name) for name in advreg.__all__)


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("advreg") == advreg.__version__


def test_types_are_shipped():
    assert (pathlib.Path(advreg.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("module", ["advreg", "advreg.cli"])
def test_importing_loads_no_extra(module):
    # Keras itself loads Matplotlib where it is installed: what advreg adds counts.
    extras = ("matplotlib", "sklearn", "tensorflow_datasets", "art", "gradio", "PIL")
    extras += ("libcst",)
    code = (
        "import sys, keras, tensorflow; before = set(sys.modules); "
        f"import {module}\n"
        f"new = set(sys.modules) - before; extras = {extras}\n"
        "print(sorted(m for m in new if m.split('.')[0] in extras))"
    )
    assert run(code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("code", "backend"),
    [
        ("import keras; keras.backend.backend = lambda: 'jax'; import advreg", None),
        # Keras cannot even be imported where the backend is not installed.
        ("import sys; sys.modules['jax'] = None; import advreg", "jax"),
    ],
)
def test_another_backend_is_refused(code, backend):
    result = run(code, **({"KERAS_BACKEND": backend} if backend else {}))
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: advreg works on Keras's TensorFlow backend")
    assert "KERAS_BACKEND=tensorflow" in message
    assert message.endswith("'jax'")


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    # What is for several machines has nothing to run on here.
    page = re.sub(r"## On several devices.*?(?=\n## )", "", README, flags=re.DOTALL)
    example = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    model, x, y, x_adv = (names[name] for name in ("model", "x", "y", "x_adv"))
    assert model.evaluate(x, y, verbose=0)[1] > 0.95
    # Plain training of this network leaves a third.
    assert model.evaluate(x_adv, y, verbose=0)[1] > 0.7
    out = capsys.readouterr().out
    assert "clean: [" in out
    assert "perturbed: [" in out
    # One step of this model, in the range of the report, is what that calls FGSM.
    report = names["report"]
    assert str(report) in out
    x_adv = model.perturb_on_batch(x, y, clip_value_min=0.0, clip_value_max=1.0)
    fgsm = model.evaluate(x_adv, y, verbose=0)[1]
    assert report.results[0].accuracy == pytest.approx(fgsm, abs=0.01)
    assert report.robust_accuracy > 0.5
    assert not report.warnings
