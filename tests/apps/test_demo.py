import dataclasses
import json

import keras
import numpy as np
import pytest

from advreg import datasets
from advreg.apps import demo, recipes
from advreg.config.norms import NormType

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

PLAIN = demo.NetworkResult(0.9899, 0.5499, 0.5499, 0.034, 5.678)
REGULARISED = demo.NetworkResult(1.0, 0.9651, 0.51494, 0.0, 12.3)


def first(data, train, test):
    return dataclasses.replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        x_test=data.x_test[:test],
        y_test=data.y_test[:test],
    )


def small_digits(train=200, test=60):
    return first(datasets.load("digits"), train, test)


@pytest.fixture
def few_digits(monkeypatch):
    data = small_digits()
    monkeypatch.setattr(datasets, "load", lambda name: data)
    return data


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    return recipes.digits_network((8, 8, 1), 10)


@pytest.fixture(scope="module")
def data():
    return small_digits(test=260)  # More than one batch, the last one partial.


class TestSettings:
    def test_recipe_fills_in(self):
        settings = demo.DemoSettings("mnist", epochs=3)
        assert settings.epochs == 3
        assert settings.multiplier == 0.2
        assert settings.radius == settings.adv_step_size == 0.2

    def test_the_radius_suits_the_norm(self):
        radii = [
            demo.DemoSettings(adv_grad_norm=norm).radius for norm in ("inf", 2, "l1")
        ]
        assert radii == [0.15, 0.7, 3.0]

    def test_zero_is_a_value(self):
        settings = demo.DemoSettings(multiplier=0.0, adv_step_size=0.0)
        assert settings.multiplier == 0.0
        assert settings.radius == 0.0

    @pytest.mark.parametrize(
        ("iterations", "random_init", "epsilon"),
        [(1, False, None), (3, False, 0.1), (1, True, 0.1)],
    )
    def test_adv_config(self, iterations, random_init, epsilon):
        settings = demo.DemoSettings(
            adv_step_size=0.1,
            multiplier=0.5,
            adv_grad_norm="l2",
            pgd_iterations=iterations,
            random_init=random_init,
        )
        config = settings.adv_config()
        neighbor = config.adv_neighbor_config
        assert config.multiplier == 0.5
        assert neighbor.adv_step_size == 0.1
        assert neighbor.adv_grad_norm is NormType.L2
        assert neighbor.pgd_iterations == iterations
        assert neighbor.random_init is random_init
        assert neighbor.pgd_epsilon == epsilon
        assert (neighbor.clip_value_min, neighbor.clip_value_max) == (0.0, 1.0)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("epochs", 0),
            ("multiplier", -0.1),
            ("adv_step_size", float("nan")),
            ("adv_grad_norm", "l3"),
            ("pgd_iterations", 0),
            ("seed", -1),
            ("seed", 2**32),
        ],
    )
    def test_wrong_values(self, field, value):
        with pytest.raises(ValueError, match=f"`{field}`"):
            demo.DemoSettings(**{field: value})


class TestNetworks:
    def test_mnist_is_the_tutorials(self):
        assert recipes.mnist_network((28, 28, 1), 10).count_params() == 93_322

    @pytest.mark.parametrize("shape", [(3, 5, 1), (32, 32, 3), (60, 40, 3)])
    def test_general_adapts(self, shape):
        network = recipes.general_network(shape, 7)
        assert network(np.zeros((2, *shape), "float32")).shape == (2, 7)

    @pytest.mark.parametrize(
        ("name", "network"),
        [
            ("digits", recipes.digits_network),
            ("mnist", recipes.mnist_network),
            ("mnist:3.0.1", recipes.mnist_network),
            ("cifar10", recipes.general_network),
        ],
    )
    def test_recipes(self, name, network):
        assert recipes.recipe_for(name).network is network

    def test_twins_have_the_same_weights_and_share_none(self):
        settings = demo.DemoSettings()
        plain, regularised = demo.make_twins(
            recipes.recipe_for("digits"), small_digits(), settings
        )
        weights = plain.get_weights()
        for a, b in zip(weights, regularised.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        plain.set_weights([w + 1 for w in weights])
        for a, b in zip(weights, regularised.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


class TestText:
    def result(self, **kwargs):
        return demo.DemoResult(
            settings=demo.DemoSettings(**kwargs),
            batch_size=32,
            test_images=10000,
            networks={"plain": PLAIN, "regularised": REGULARISED},
            figure="here/perturbations.png",
        )

    def test_table_parses_back(self):
        head, rule, *rows = str(self.result()).split("\n\n")[0].splitlines()
        assert head.split("  ")[0] == "network"
        assert set(rule) == {"-", " "}
        assert len({len(line) for line in (head, rule, *rows)}) == 1
        for row, (name, expected) in zip(
            rows, {"plain": PLAIN, "regularised": REGULARISED}.items(), strict=True
        ):
            cells = row.replace(" %", "").split()
            assert cells[0] == name
            *accuracies, seconds = map(float, cells[1:])
            *fractions, time = dataclasses.astuple(expected)
            np.testing.assert_allclose(accuracies, 100 * np.array(fractions), atol=5e-3)
            assert seconds == round(time, 2)
            assert row.count(" %") == 4

    def test_accuracies_have_two_decimals(self):
        table = demo.format_table({"regularised": REGULARISED})
        assert "51.49 %" in table
        assert "100.00 %" in table

    def test_every_column_is_explained(self):
        table, notes = str(self.result()).split("\n\n")
        head = table.splitlines()[0]
        explained = [line.split("  ")[0] for line in notes.splitlines()[1:-1]]
        assert " ".join(["network", *explained]).split() == head.split()

    def test_notes_state_the_conditions(self):
        notes = str(self.result(adv_step_size=0.25, adv_grad_norm="linf"))
        for part in ("digits", "10,000", "radius 0.25", "infinity", "here/pert"):
            assert part in notes

    def test_one_epoch_includes_compilation(self):
        assert "compilation included" in str(self.result(epochs=1))
        assert "compilation left out" in str(self.result(epochs=2))

    def test_json(self):
        result = json.loads(json.dumps(self.result(adv_grad_norm="linf").to_dict()))
        assert result["networks"]["plain"] == dataclasses.asdict(PLAIN)
        assert result["adv_grad_norm"] == "infinity"
        assert result["radius"] == result["adv_step_size"] == 0.15


@pytest.mark.parametrize(
    ("seconds", "typical"), [([9.0], 9.0), ([9.0, 1.0], 1.0), ([9, 1, 5, 2], 2)]
)
def test_first_epoch_is_left_out(seconds, typical):
    timer = demo.EpochTimer()
    timer.seconds = seconds
    assert timer.typical() == typical


class TestRun:
    def settings(self, tmp_path, **kwargs):
        return demo.DemoSettings(**{"epochs": 1, "output_dir": tmp_path, **kwargs})

    @pytest.mark.slow
    def test_repeats(self, few_digits, tmp_path, capsys):
        def accuracies():
            result = demo.run(self.settings(tmp_path), verbose=0)
            return [dataclasses.astuple(r)[:-1] for r in result.networks.values()]

        assert accuracies() == accuracies()
        assert capsys.readouterr().out == ""

    @pytest.mark.slow
    def test_without_adversarial_loss_twins_stay_twins(self, few_digits, tmp_path):
        settings = self.settings(tmp_path, multiplier=0.0)
        networks = demo.run(settings, verbose=0).networks
        plain, regularised = (dataclasses.astuple(r)[:-1] for r in networks.values())
        assert plain == regularised

    @pytest.mark.slow
    def test_radius_zero_is_clean(self, few_digits, tmp_path):
        settings = self.settings(tmp_path, adv_step_size=0.0)
        for result in demo.run(settings, verbose=0).networks.values():
            assert result.clean == result.fgsm_on_plain == result.fgsm == result.pgd

    def test_without_matplotlib_nothing_is_trained(self, monkeypatch, tmp_path):
        import sys

        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setattr(demo, "train_network", lambda *_: pytest.fail("trained"))
        with pytest.raises(ImportError, match=r"advreg\[demo\]"):
            demo.run(self.settings(tmp_path))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1])
    def test_digits_show_the_effect(self, tmp_path, seed):
        settings = demo.DemoSettings(seed=seed, output_dir=tmp_path)
        plain, regularised = demo.run(settings, verbose=0).networks.values()
        assert plain.clean > 0.95
        assert regularised.clean > plain.clean - 0.015
        assert regularised.fgsm_on_plain > plain.fgsm_on_plain + 0.3
        assert regularised.fgsm > plain.fgsm + 0.25
        assert regularised.pgd > plain.pgd + 0.25
        for result in (plain, regularised):
            assert result.pgd <= result.fgsm <= result.clean
            assert result.seconds_per_epoch > 0
        assert plain.fgsm == plain.fgsm_on_plain

    @pytest.mark.slow
    def test_one_epoch_on_mnist_shows_the_effect(
        self, tmp_path, mnist_dir, monkeypatch
    ):
        # Five epochs are what README quotes: 48-55 % against 96 % under FGSM.
        data = first(datasets.load("mnist"), train=None, test=2_000)
        monkeypatch.setattr(datasets, "load", lambda name: data)
        settings = demo.DemoSettings("mnist", epochs=1, output_dir=tmp_path)
        plain, regularised = demo.run(settings, verbose=0).networks.values()
        assert min(plain.clean, regularised.clean) > 0.975
        assert plain.fgsm_on_plain < 0.65
        assert regularised.fgsm_on_plain > 0.8
        assert regularised.fgsm > plain.fgsm + 0.2
        assert regularised.pgd > plain.pgd + 0.2
